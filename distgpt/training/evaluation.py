"""Validation: fixed windows, a value that does not depend on the number of ranks."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from distgpt.config import Config
from distgpt.corpus.loader import EvaluationBatches
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.distributed.collectives import sum_over_ranks
from distgpt.distributed.parallelize import autocast, inference
from distgpt.distributed.runtime import Runtime
from distgpt.model.generate import generate


@dataclass(frozen=True)
class Evaluation:
    val_loss: float  # nats per token
    val_bits_per_byte: float


def evaluate(
    model: nn.Module, batches: EvaluationBatches, *, tokenizer: Tokenizer, runtime: Runtime, dtype: torch.dtype
) -> Evaluation:
    """The mean loss over the validation windows. All ranks call it, since a sharded model needs each in its forward.

    The same micro-batches are computed for any number of ranks, and each window's loss has one writer, so the sum
    over ranks adds zeros only; the mean is taken in float64.
    """
    losses_N = torch.zeros(batches.windows, dtype=torch.float64, device=runtime.device)
    text_bytes = torch.zeros((), dtype=torch.float64, device=runtime.device)
    bytes_of_token_V = torch.from_numpy(tokenizer.token_bytes()).to(runtime.device)
    block_size = 0
    with inference(model) as gpt:
        for indices, x_BT, y_BT in batches:
            with autocast(runtime.device, dtype):
                loss_B = gpt(x_BT, y_BT)
            block_size = y_BT.shape[1]
            if np.all(indices >= 0):
                losses_N[torch.from_numpy(indices).to(runtime.device)] = loss_B.double()
                text_bytes += bytes_of_token_V[y_BT].sum()
    losses_N = sum_over_ranks(losses_N, runtime)
    val_loss = losses_N.mean().item()
    nats = losses_N.sum().item() * block_size
    return Evaluation(val_loss, nats / math.log(2) / max(1.0, sum_over_ranks(text_bytes, runtime).item()))


def sample_text(
    model: nn.Module, tokenizer: Tokenizer, step: int, config: Config, runtime: Runtime, dtype: torch.dtype
) -> str:
    """What the model writes unprompted. All ranks call it, and draw the same tokens."""
    generator = torch.Generator().manual_seed(config.run.seed + step)
    with inference(model) as gpt, autocast(runtime.device, dtype), torch.compiler.set_stance("force_eager"):
        drawn = list(generate(gpt, [], max_tokens=config.eval.sample_tokens, generator=generator))
    return tokenizer.decode(drawn)
