"""Muon for the matrices of the blocks, beside AdamW for all other parameters, as one optimizer.

Muon moves a matrix along its momentum, made nearly orthogonal: Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon. Its steps have the size that AdamW's usually have, and so share AdamW's
learning rate and weight decay: Moonlight, Liu et al. 2025, arXiv:2502.16982.

To make a momentum orthogonal takes the whole matrix, and time. So the ranks take turns, each with another matrix.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distgpt.model.adamw import local_shard

MOMENTUM = 0.95
# Jordan's polynomial. Five times applied, it takes all singular values from 0.002 to 1 to between 0.68 and 1.21.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# The root mean square of AdamW's usual updates, at a learning rate of 1 (Moonlight, section 2.2).
ADAMW_RMS = 0.2


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of attention and mlp in all blocks, those of one shape together."""
    matrices = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2 and p.requires_grad]
    return sorted(matrices, key=lambda p: p.shape)


def orthogonalize(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T of a matrix U S V^T, by Newton-Schulz iterations in `dtype`. bfloat16 is precise enough."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    result: Tensor = (x.mT if tall else x).to(matrix.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """Updates `matrices`, the first parameter group, by Muon, and the groups of `adamw` by that.

    Takes `grad_scale` and `found_inf` as fused AdamW does, see apply_update. Matrices and their gradients are whole and
    equal on all ranks, or sharded by rows over the last dimension of a mesh. All ranks call step together.
    """

    def __init__(
        self, matrices: list[nn.Parameter], adamw: torch.optim.AdamW, *, weight_decay: float, dtype: torch.dtype
    ) -> None:
        """`dtype`: of the products of matrices."""
        self._adamw: Any = adamw  # grad_scale and found_inf have no type in torch
        self._dtype = dtype
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        super().__init__([{"params": matrices, "weight_decay": weight_decay}, *adamw.param_groups], adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients. `closure` is not supported."""
        assert closure is None
        matrices, *others = self.param_groups
        parameters = [p for p in matrices["params"] if p.grad is not None]
        turns = _sharing_ranks(parameters)
        for start in range(0, len(parameters), turns):
            turn = parameters[start : start + turns]
            updates = _orthogonalize_shared(turn, [self._update_momentum(p) for p in turn], self._dtype)
            for parameter, update in zip(turn, updates, strict=True):
                self._move(parameter, update, lr=matrices["lr"], weight_decay=matrices["weight_decay"])
        # Loading a state replaces both.
        self._adamw.param_groups, self._adamw.state = others, self.state
        self._adamw.grad_scale, self._adamw.found_inf = self.grad_scale, self.found_inf
        self._adamw.step()

    def _update_momentum(self, parameter: nn.Parameter) -> Tensor:
        """Add the gradient to the momentum and return what Nesterov's method takes from both, of this rank's shard."""
        state, gradient = self.state[parameter], local_shard(cast(Tensor, parameter.grad))
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = local_shard(state["momentum"])
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        updated = _between(momentum, gradient, 1 - MOMENTUM)
        self._set(momentum, updated)
        return _between(gradient, updated, MOMENTUM)

    def _move(self, parameter: nn.Parameter, update: Tensor, *, lr: float, weight_decay: float) -> None:
        """Take this rank's shard of a weight one step along `update`."""
        weight = local_shard(parameter)
        scale = ADAMW_RMS * math.sqrt(max(parameter.shape))
        self._set(weight, (weight * (1 - lr * weight_decay)).sub_(update * (lr * scale)))

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        """Set a tensor, unless this step is skipped, which the device decides."""
        tensor.copy_(value if self.found_inf is None else torch.where(self.found_inf.bool(), tensor, value))


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Return start + share (end - start). lerp may round the elements of a shard in another way than the whole."""
    return (end - start).mul_(share).add_(start)


def _sharing_ranks(parameters: list[nn.Parameter]) -> int:
    """Return the number of ranks that share the matrices out: those of a shard group, or all if they hold all."""
    if parameters and isinstance(parameters[0], DTensor):
        return _shard_group(parameters[0]).size()
    return dist.get_world_size() if dist.is_initialized() else 1


def _orthogonalize_shared(parameters: list[nn.Parameter], momenta: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return each momentum orthogonalized, or this rank's shard of it. Each rank computes one of them."""
    if isinstance(parameters[0], DTensor):
        return _orthogonalize_shards(momenta, [p.shape for p in parameters], _shard_group(parameters[0]), dtype)
    if not dist.is_initialized():
        return [orthogonalize(momentum, dtype) for momentum in momenta]
    own, results = dist.get_rank(), [torch.empty_like(momentum) for momentum in momenta]
    for rank, (momentum, result) in enumerate(zip(momenta, results, strict=True)):
        if rank == own:
            result.copy_(orthogonalize(momentum, dtype))
    for rank, result in enumerate(results):
        dist.broadcast(result, rank)
    return results


def _orthogonalize_shards(
    shards: list[Tensor], shapes: list[torch.Size], group: dist.ProcessGroup, dtype: torch.dtype
) -> list[Tensor]:
    """Return this rank's shard of each matrix orthogonalized. Rank i computes matrix i from all shards of it."""
    rank, ranks = group.rank(), group.size()
    own = [shard.numel() for shard in shards] + [0] * (ranks - len(shards))
    theirs = [_shard_size(shapes[rank], other, ranks) if rank < len(shapes) else 0 for other in range(ranks)]
    sent = torch.cat([shard.flatten() for shard in shards])
    whole, result = sent.new_empty(sum(theirs)), torch.empty_like(sent)
    dist.all_to_all_single(whole, sent, theirs, own, group=group)
    if rank < len(shapes):
        whole = orthogonalize(whole.view(shapes[rank]), dtype).flatten()
    dist.all_to_all_single(result, whole, own, theirs, group=group)
    return [part.view_as(shard) for part, shard in zip(torch.split(result, own), shards, strict=False)]


def _shard_group(parameter: DTensor) -> dist.ProcessGroup:
    """Return the ranks that together hold all rows of a parameter."""
    mesh = parameter.device_mesh
    return mesh.get_group(mesh.ndim - 1)


def _shard_size(shape: torch.Size, rank: int, ranks: int) -> int:
    """Return the number of values that a rank holds: FSDP2 gives each the same number of rows, rounded up, in order."""
    rows = -(-shape[0] // ranks)
    return min(rows, max(0, shape[0] - rank * rows)) * shape[1]
