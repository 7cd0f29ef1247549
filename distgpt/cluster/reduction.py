"""What ranks tell each other every step, besides gradients."""

import math
import socket
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distgpt.cluster.messages import all_gather
from distgpt.cluster.runtime import Runtime
from distgpt.errors import UsageError

T = TypeVar("T")


def agreed(loss: Tensor, grad_norm: Tensor, flag: bool, runtime: Runtime) -> tuple[float, float, bool]:
    """The means of two scalars over ranks, and whether any rank raised `flag`.

    One message, and what is decided by its values is decided alike on all ranks, also where unlike devices round a
    norm that is the same for all differently.
    """
    values = torch.stack((loss.float(), grad_norm.float(), torch.tensor(float(flag), device=loss.device)))
    if runtime.distributed:
        dist.all_reduce(values)
    losses, norms, flags = values.tolist()
    return losses / runtime.world_size, norms / runtime.world_size, flags > 0


def grad_norm_of(model: nn.Module) -> Tensor:
    """The L2 norm of all gradients, over all shards; the same value on every rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def weights_are_finite(model: nn.Module, runtime: Runtime) -> bool:
    """Whether all weights are, on all ranks; the same answer on every rank."""
    norm = nn.utils.get_total_norm([p.detach() for p in model.parameters()])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return math.isfinite(sum_over_ranks(whole.clone(), runtime).item())


def require_agreement(facts: dict[str, Any], runtime: Runtime) -> None:
    """Raise UsageError on all ranks, naming the first that differs from rank 0 and in what."""
    if not runtime.distributed:
        return
    everyone = all_gather((socket.gethostname(), facts))
    _, expected = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        different = [key for key in expected if theirs[key] != expected[key]]
        if different:
            raise UsageError(f"rank {rank} on {host} was started with another {', '.join(different)} than rank 0")


def from_rank_zero(value: T, runtime: Runtime) -> T:
    """Rank 0's value, on every rank, as JSON has it."""
    return cast(T, all_gather(value if runtime.rank == 0 else None)[0]) if runtime.distributed else value


def sum_over_ranks(values: Tensor, runtime: Runtime) -> Tensor:
    """The elementwise sum, in place. Exact where at most one rank has a value that is not zero."""
    if runtime.distributed:
        dist.all_reduce(values)
    return values


def gathered(row: Sequence[float], runtime: Runtime) -> list[list[float]]:
    """Every rank's row, by rank; all of the same length."""
    rows = torch.zeros(runtime.world_size, len(row), dtype=torch.float64, device=runtime.device)
    rows[runtime.rank] = torch.tensor(row, dtype=torch.float64)
    found: list[list[float]] = sum_over_ranks(rows, runtime).tolist()
    return found


def hosts_of_ranks(runtime: Runtime) -> list[str]:
    """The name of every rank's host, by rank."""
    return all_gather(socket.gethostname()) if runtime.distributed else [socket.gethostname()]
