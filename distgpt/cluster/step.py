"""One optimizer step: the gradients of the global batch, then the update."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distgpt.cluster.parallel import autocast, gradient_sync
from distgpt.cluster.runtime import Runtime
from distgpt.config import Config
from distgpt.corpus.loader import MicroBatch


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    step: int,
    config: Config,
    runtime: Runtime,
    dtype: torch.dtype,
) -> Tensor:
    """Forward and backward over this rank's micro-batches; their mean loss. Gradients: means over the global batch."""
    loss_sum = torch.zeros((), device=runtime.device)
    for index, (x_BT, y_BT) in enumerate(micro_batches):
        torch.manual_seed(dropout_seed(config.run.seed, step, runtime.rank * len(micro_batches) + index))
        with gradient_sync(model, last=index == len(micro_batches) - 1):
            with autocast(runtime.device, dtype):
                loss = model(x_BT, y_BT).mean() / len(micro_batches)
            loss.backward()
        loss_sum += loss.detach()
    return loss_sum


def dropout_seed(seed: int, step: int, micro_batch_index: int) -> int:
    """What dropout draws from in one micro-batch of the global batch, whichever rank computes it."""
    digest = hashlib.blake2b(f"{seed} {step} {micro_batch_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def update(model: nn.Module, optimizer: torch.optim.Optimizer, grad_norm: Tensor, *, clip: float) -> None:
    """Step along the gradients, of norm `grad_norm`, scaled down to at most `clip` (0: as they are)."""
    if clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, grad_norm)
    optimizer.step()
