"""One optimizer step: the gradients of the global batch, then the update."""

import hashlib
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distgpt.config import Config
from distgpt.corpus.loader import MicroBatch
from distgpt.distributed.parallelize import autocast, gradient_sync
from distgpt.distributed.runtime import Runtime

# A signal is heeded within about so many seconds, or at the end of the micro-batch where that takes longer.
CHECK_SECONDS = 5.0


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    step: int,
    config: Config,
    runtime: Runtime,
    dtype: torch.dtype,
    after_each: Callable[[int, int], None] = lambda done, count: None,
) -> Tensor:
    """Forward and backward over this rank's micro-batches; their mean loss. Gradients: means over the global batch.

    `after_each` is told how many micro-batches are done, of how many.
    """
    loss_sum = torch.zeros((), device=runtime.device)
    for index, (x_BT, y_BT) in enumerate(micro_batches):
        seed_dropout(runtime.device, dropout_seed(config.run.seed, step, runtime.rank * len(micro_batches) + index))
        with gradient_sync(model, last=index == len(micro_batches) - 1):
            with autocast(runtime.device, dtype):
                loss = model(x_BT, y_BT).mean() / len(micro_batches)
            loss.backward()
        loss_sum += loss.detach()
        after_each(index + 1, len(micro_batches))
    return loss_sum


class StopCheck:
    """Has all ranks agree between two micro-batches whether to stop in the middle of a long step.

    They ask each other every CHECK_SECONDS or so, counted in micro-batches, so that all do it in the same place. A step
    that is shorter ends before.
    """

    def __init__(self, requested: Callable[[], bool], runtime: Runtime, *, waited: Callable[[float], object]) -> None:
        """`waited` is told the seconds that this rank waited for the others."""
        self._requested, self._runtime, self._waited = requested, runtime, waited
        self._left, self._passed = 1, 0  # micro-batches until the next check, and since the last one
        self._last = time.monotonic()

    def agreed(self) -> bool:
        """Whether all stop here; each rank calls it after each of its micro-batches but the last one of a step."""
        self._left, self._passed = self._left - 1, self._passed + 1
        if self._left:
            return False
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        now = time.monotonic()
        each = (now - self._last) / self._passed
        values = torch.tensor([self._requested(), each], dtype=torch.float64, device=self._runtime.device)
        if self._runtime.distributed:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        stop, each = values.tolist()
        self._last, self._passed = time.monotonic(), 0
        self._left = max(1, int(CHECK_SECONDS / max(each, 1e-6)))
        self._waited(self._last - now)
        return bool(stop)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Have dropout on this device draw from `seed`.

    torch.manual_seed also seeds every other type of device, which takes a millisecond.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def dropout_seed(seed: int, step: int, micro_batch_index: int) -> int:
    """What dropout draws from in one micro-batch of the global batch, whichever rank computes it."""
    digest = hashlib.blake2b(f"{seed} {step} {micro_batch_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def update(model: nn.Module, optimizer: torch.optim.Optimizer, grad_norm: Tensor, *, clip: float) -> None:
    """Step along the gradients, of norm `grad_norm`, scaled down to at most `clip` (0: as they are)."""
    if clip:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, grad_norm)
    optimizer.step()
