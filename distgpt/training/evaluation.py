"""The validation loss, over fixed windows and equal for any number of ranks, and a sample of text."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from distgpt.config import Config
from distgpt.corpus.loader import EvaluationBatches
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.distributed.collectives import sum_over_ranks
from distgpt.distributed.parallelize import autocast, inference
from distgpt.distributed.plan import Plan
from distgpt.model.generate import Sampling, generate
from distgpt.telemetry.metrics import Evaluation


def evaluate(model: nn.Module, batches: EvaluationBatches, tokenizer: Tokenizer, plan: Plan) -> Evaluation:
    """Compute the mean loss over the validation windows. All ranks call it: a sharded model needs each in its forward.

    The micro-batches are the same for any number of ranks, and one rank computes the loss of each window, so the sum
    over ranks only adds zeros to it. The mean is taken in float64. Of a mix, each dataset has its share in the mean,
    however many windows it has.
    """
    runtime = plan.runtime
    losses_N = torch.zeros(batches.windows, dtype=torch.float64, device=runtime.float64_device)
    weights_N = torch.ones_like(losses_N)
    for windows, part in batches.parts:
        weights_N[windows] = part.share * batches.windows / (windows.stop - windows.start)
    text_bytes_N = torch.zeros_like(losses_N)
    bytes_of_token_V = torch.from_numpy(tokenizer.token_bytes()).to(runtime.device)
    block_size = 0
    with inference(model) as gpt:
        for indices, x_BT, y_BT in batches:
            with autocast(runtime.device, plan.dtype):
                loss_B = gpt(x_BT, y_BT)
            block_size = y_BT.shape[1]
            if np.all(indices >= 0):
                # They are consecutive. A tensor of indices would have to be copied to the device, which waits for it.
                here = slice(int(indices[0]), int(indices[-1]) + 1)
                losses_N[here] = loss_B.to(losses_N.device).double()
                text_bytes_N[here] = bytes_of_token_V[y_BT].sum(dim=1).to(text_bytes_N)
    losses_N, text_bytes_N = sum_over_ranks(torch.stack((losses_N, text_bytes_N)), runtime)
    weighted_N = losses_N * weights_N
    nats = weighted_N.sum().item() * block_size
    bits_per_byte = nats / math.log(2) / max(1.0, (text_bytes_N * weights_N).sum().item())
    each = {part.name: losses_N[windows].mean().item() for windows, part in batches.parts if part.name}
    errors = [(part.share, standard_error(losses_N[windows])) for windows, part in batches.parts]
    known = [share * error for share, error in errors if error is not None]
    error = math.hypot(*known) if len(known) == len(errors) else None  # the datasets are independent samples
    return Evaluation(weighted_N.mean().item(), bits_per_byte, error, each)


def standard_error(values_N: Tensor) -> float | None:
    """Return the standard error of the mean of a sample: s / sqrt(N), s with N - 1; None for a single value."""
    return values_N.std().item() / math.sqrt(len(values_N)) if len(values_N) > 1 else None


def sample_text(model: nn.Module, tokenizer: Tokenizer, step: int, config: Config, plan: Plan) -> str:
    """Generate a text without a prompt. All ranks call it, and draw the same tokens."""
    generator = torch.Generator().manual_seed(config.run.seed + step)
    with inference(model) as gpt, autocast(plan.runtime.device, plan.dtype), torch.compiler.set_stance("force_eager"):
        tokens = generate(gpt, [[]], max_tokens=config.eval.sample_tokens, sampling=Sampling(), generators=[generator])
        return tokenizer.decode([token for _, token in tokens])
