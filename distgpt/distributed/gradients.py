"""The gradient of the global batch: the sum over its micro-batches and the ranks.

By default DDP and FSDP add float32 numbers, in an order that depends on the number of ranks. With
parallel.reduction=exact the gradients, their norm and the loss are the same to the bit on any number of ranks: each
micro-batch is computed in the same way, and the sums are exact, see exact.py.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from distgpt.distributed.collectives import grad_norm_of, mean_figures
from distgpt.distributed.exact import (
    MAX_GRADIENT,
    MAX_SUMMAND,
    digest,
    fits,
    from_units,
    joined,
    largest,
    row_sums,
    split_sum,
    to_units,
)
from distgpt.distributed.mesh import same_shard_group
from distgpt.distributed.parallelize import unwrap_model
from distgpt.distributed.plan import Plan
from distgpt.model.adamw import local_shard


class Gradients:
    """Sums the gradients of a model as DDP and FSDP do it."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan

    @property
    def loss_weight(self) -> float:
        """The factor of a micro-batch's loss. DDP and FSDP take the mean over ranks by themselves."""
        return 1 / self.plan.accumulation

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Wrap forward and backward of a micro-batch: ranks exchange gradients in the `last` one, or as planned."""
        context: AbstractContextManager[None] = nullcontext()
        if isinstance(self.model, DistributedDataParallel) and not last:
            context = self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_requires_gradient_sync(last or self.plan.reduce_each)
            self.model.set_requires_all_reduce(last)  # across the replicas of hsdp
            # Weights do not change before the last backward pass, so they can be kept for the next micro-batch.
            self.model.set_reshard_after_backward(last or self.plan.reshard)
        with context:
            yield

    def finish(self, losses_M: Tensor, *, stop: bool) -> tuple[Tensor, Tensor]:
        """Finish the sum. Returns the L2 norm of all gradients, and the figures of the step, equal on every rank.

        `losses_M`: the weighted losses of the micro-batches of this rank. The figures, (3,), are the means over ranks
        of loss and norm, and the number of ranks with `stop` set.
        """
        norm = grad_norm_of(self.model)
        return norm, mean_figures(losses_M.sum(), norm, stop, self.plan.runtime)


class ExactGradients(Gradients):
    """Sums the gradients of a model exactly.

    A weight's gradient of one micro-batch becomes integers as soon as autograd or, of a sharded model, FSDP has it.
    These are added up, and exchanged after the last micro-batch (or after each, if the plan says so and it is sharded).
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__(model, plan)
        runtime = plan.runtime
        self.last = True
        self.largest = torch.zeros((), device=runtime.device)  # absolute value in a gradient of this rank
        self.digest: Tensor | None = None  # of the gradients of the last micro-batch, where it is asked for
        self.discards = False  # gradients are for the digest alone
        self._units: dict[Tensor, Tensor] = {}  # sums of gradients, by parameter
        self._exchanges: list[Any] = []
        self._replicas = runtime.world_size // plan.ranks_per_replica
        if not plan.sharded:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(self._add)  # type: ignore[no-untyped-call]
            return
        across = same_shard_group(plan) if self._replicas > 1 else None
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(ExactReduceScatter(self, across))  # type: ignore[arg-type]

    @property
    def loss_weight(self) -> float:
        return 1 / (self.plan.accumulation * self.plan.runtime.world_size)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        self.last = last
        if self.digest is not None:
            self.digest = torch.zeros_like(self.digest)
        if isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_reshard_after_backward(last or self.plan.reshard)
        yield

    def digests(self, wanted: bool) -> None:
        """Set whether `digest` is computed, of each micro-batch anew."""
        self.digest = torch.zeros((), dtype=torch.int64, device=self.plan.runtime.device) if wanted else None

    def digest_of(self, compute: Callable[[], object]) -> Tensor:
        """Return the digest of a micro-batch whose forward and backward pass `compute` runs. No gradient changes."""
        self.discards = True
        self.digests(True)
        with self.micro_batch(last=True):  # FSDP shards its parameters again
            compute()
        self.discards = False
        assert self.digest is not None
        return self.digest

    def finish(self, losses_M: Tensor, *, stop: bool) -> tuple[Tensor, Tensor]:
        for exchange in self._exchanges:
            exchange.wait()
        self._exchanges = []
        while self._units:  # frees each sum as soon as it is a gradient
            parameter, units = self._units.popitem()
            parameter.grad = from_units(units)
        squares = self._split_sum_of_squares()
        sums = torch.cat(
            [
                split_sum(losses_M.double()),
                squares,
                (~self._usable(losses_M, squares)).view(1),
                torch.full((1,), stop, device=squares.device),
            ]
        )
        self.largest = torch.zeros_like(self.largest)
        if self.plan.runtime.distributed:
            dist.all_reduce(sums)
        unusable, stops = sums[4:].double()
        loss = joined(sums[0:2]).where(unusable == 0, torch.nan)
        norm = joined(sums[2:4]).sqrt().where(unusable == 0, torch.nan)
        return norm, torch.stack([loss, norm, stops])

    def to_units(self, gradient: Tensor) -> Tensor:
        """Return the gradient of one micro-batch as integers, and remember how large it is."""
        self.largest = torch.maximum(self.largest, largest(gradient))
        units = to_units(gradient)
        if self.digest is not None:
            self.digest += digest(units)
        return units

    def _add(self, parameter: Tensor) -> None:
        """Take the gradient that autograd has just added to a parameter: a hook of autograd."""
        assert parameter.grad is not None
        units, parameter.grad = self.to_units(parameter.grad), None
        if self.discards:
            return
        total = self._units[parameter] = self._units[parameter].add_(units) if parameter in self._units else units
        if self.last and self.plan.runtime.distributed:
            self._exchanges.append(dist.all_reduce(total, async_op=True))

    def _split_sum_of_squares(self) -> Tensor:
        """Return this rank's part of the sum of all squares: each replica adds up some of the parameters."""
        replica = self.plan.runtime.rank // self.plan.ranks_per_replica
        squares = [torch.zeros(1, dtype=torch.float64, device=self.plan.runtime.device)]
        for parameter in list(unwrap_model(self.model).parameters())[replica :: self._replicas]:
            if parameter.grad is not None and (gradient := local_shard(parameter.grad)).numel():
                squares.append(row_sums(gradient.double().square_().view(len(gradient), -1)))
        return split_sum(torch.cat(squares))

    def _usable(self, losses_M: Tensor, squares: Tensor) -> Tensor:
        """Tell whether all numbers that this rank adds are small enough to be added."""
        micro_batches = self.plan.accumulation * self.plan.runtime.world_size
        return (
            fits(self.largest, MAX_GRADIENT / micro_batches)
            & fits(largest(losses_M), MAX_SUMMAND / micro_batches)
            & fits(joined(squares), MAX_SUMMAND)
        )


class ExactReduceScatter:
    """The reduce-scatter of one FSDP unit, called by FSDP in each backward pass.

    Until the last micro-batch the sum is kept here and FSDP gets zeros, to which it then adds the whole sum.
    """

    def __init__(self, gradients: ExactGradients, across: dist.ProcessGroup | None) -> None:
        """`across`: the ranks that hold the same shard in other replicas."""
        self._gradients, self._across = gradients, across
        self._units: Tensor | None = None  # whole or, if gradients are exchanged after each micro-batch, a shard

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized tensor for a collective, as FSDP asks for it."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Add up the gradients of all shards, `input_tensor`; FSDP adds `output_tensor` to those of this shard."""
        units = self._gradients.to_units(input_tensor)
        if self._gradients.discards:
            output_tensor.zero_()
            return
        exchanges_each = self._gradients.plan.reduce_each
        if exchanges_each:
            units = scattered_sum(units, group)
        self._units = units if self._units is None else self._units.add_(units)
        if not self._gradients.last:
            output_tensor.zero_()
            return
        total = self._units if exchanges_each else scattered_sum(self._units, group)
        self._units = None
        if self._across is not None:
            dist.all_reduce(total, group=self._across)
        output_tensor.copy_(from_units(total))


def scattered_sum(units: Tensor, group: Any) -> Tensor:
    """Return this rank's shard of the sum over a group. gloo's own reduce-scatter would send twice as much."""
    received = torch.empty_like(units)
    dist.all_to_all_single(received, units, group=group)
    return received.view(dist.get_world_size(group), -1).sum(dim=0)


def gradients_of(model: nn.Module, plan: Plan) -> Gradients:
    """Return what sums the gradients of a model of build_model, as the plan says."""
    return ExactGradients(model, plan) if plan.exact else Gradients(model, plan)
