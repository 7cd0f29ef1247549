"""One optimizer step: the gradients of the global batch, then the update."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distgpt.corpus.loader import MicroBatch
from distgpt.distributed.gradients import Gradients
from distgpt.distributed.parallelize import autocast
from distgpt.distributed.runtime import Runtime
from distgpt.model.dropout import derived_seed

# Ranks compare their stop requests every so many seconds, or after each micro-batch if one takes longer.
CHECK_SECONDS = 5.0


def accumulate_gradients(
    gradients: Gradients,
    micro_batches: Sequence[MicroBatch],
    step: int,
    *,
    seed: int,
    after_each: Callable[[int, int], None] = lambda done, count: None,
) -> Tensor:
    """Run forward and backward over the M micro-batches of this rank and return their weighted losses, (M,).

    After gradients.finish(), which takes the losses, gradients are means over the global batch. `seed`: of the run.
    `after_each` gets the number of micro-batches that are done, and their total number.
    """
    count = len(micro_batches)
    first = gradients.plan.runtime.rank * count
    losses = []
    for index, micro_batch in enumerate(micro_batches):
        with gradients.micro_batch(last=index == count - 1):
            losses.append(differentiate(gradients, micro_batch, step, first + index, seed=seed))
        after_each(index + 1, count)
    return torch.stack(losses)


def differentiate(gradients: Gradients, micro_batch: MicroBatch, step: int, index: int, *, seed: int) -> Tensor:
    """Run forward and backward over one micro-batch, number `index` of the global batch. Returns its weighted loss.

    On a CPU the dropout masks of a sequence depend on (seed, step, its position in the global batch) alone. A GPU and
    compiled code draw those of a whole micro-batch from one seed.
    """
    plan, (x_BT, y_BT) = gradients.plan, micro_batch
    first = index * len(x_BT)
    seeds = [derived_seed(seed, step, position) for position in range(first, first + len(x_BT))]
    by_sequence = plan.runtime.device.type == "cpu" and not plan.compile
    if not by_sequence:
        seed_dropout(plan.runtime.device, seeds[0])
    with autocast(plan.runtime.device, plan.dtype):
        losses_B = gradients.model(x_BT, y_BT, dropout_seeds=seeds if by_sequence else None)
        loss = losses_B.mean() * gradients.loss_weight
    loss.backward()
    weighted_loss: Tensor = loss.detach()
    return weighted_loss


class StopCheck:
    """Lets all ranks agree, between two micro-batches, to stop in the middle of a long step.

    They check about every CHECK_SECONDS, counted in micro-batches, so that all check after the same one.
    """

    def __init__(self, requested: Callable[[], bool], runtime: Runtime, *, on_wait: Callable[[float], object]) -> None:
        """`on_wait` gets the seconds that this rank waited for the others in each check."""
        self._requested, self._runtime, self._on_wait = requested, runtime, on_wait
        self._until_check, self._since_check = 1, 0  # micro-batches
        self._checked_at = time.monotonic()

    def agreed(self) -> bool:
        """Tell whether all ranks stop now. Each rank calls it after each micro-batch except the last of a step."""
        self._until_check, self._since_check = self._until_check - 1, self._since_check + 1
        if self._until_check:
            return False
        if self._runtime.device.type != "cpu":
            torch.accelerator.synchronize(self._runtime.device)
        now = time.monotonic()
        seconds = (now - self._checked_at) / self._since_check
        values = torch.tensor([self._requested(), seconds], dtype=torch.float64, device=self._runtime.float64_device)
        if self._runtime.distributed:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        stop, seconds = values.tolist()
        self._checked_at, self._since_check = time.monotonic(), 0
        self._until_check = max(1, int(CHECK_SECONDS / max(seconds, 1e-6)))
        self._on_wait(self._checked_at - now)
        return bool(stop)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generator of dropout on this device. torch.manual_seed seeds all types, which takes a millisecond."""
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def apply_update(
    optimizer: torch.optim.Optimizer, grad_norm: Tensor, *, clip: float, skip: Tensor | None = None
) -> None:
    """Take an optimizer step, with gradients scaled down from `grad_norm` to a norm of at most `clip` (0: unscaled).

    A `skip` of 1.0 leaves weights and moments as they are. Fused AdamW and Muon read both on the device, as torch's
    GradScaler hands them over, so the host need not know them. AdamW on an Apple GPU ignores them.
    """
    assert optimizer.defaults["fused"] or hasattr(optimizer, "grad_scale")
    fused: Any = optimizer  # these attributes have no type in torch
    if grad_norm.device.type == "mps":
        apply_update_from_host(optimizer, grad_norm, clip=clip, skip=skip)
        return
    fused.grad_scale = ((grad_norm.float() + 1e-6) / clip).clamp(min=1.0) if clip else None
    fused.found_inf = skip
    optimizer.step()


def apply_update_from_host(
    optimizer: torch.optim.Optimizer, grad_norm: Tensor, *, clip: float, skip: Tensor | None
) -> None:
    """Do what apply_update does where the device cannot: the host waits for it, then decides and scales."""
    if skip is not None and skip.item():
        return
    if clip:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, clip, grad_norm)
    optimizer.step()
