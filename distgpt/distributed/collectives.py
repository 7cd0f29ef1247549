"""Exchange values between ranks, besides gradients: scalars, rows of numbers, and JSON.

JSON travels in tensors. A pickle would let its sender run code here.
"""

import json
import math
import socket
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distgpt.distributed.runtime import Runtime
from distgpt.errors import Interrupted, UsageError

T = TypeVar("T")


def all_gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the value of every rank, by rank. Raises Interrupted if a rank sent something else."""
    gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    try:
        return [json.loads(bytes(t[: int(size)].tolist())) for t, size in zip(texts, sizes, strict=True)]
    except ValueError as error:
        raise Interrupted(f"a rank sent a message that is not JSON: {error}") from None


def mean_figures(loss: Tensor, grad_norm: Tensor, stop: bool, runtime: Runtime) -> Tensor:
    """Return the means over ranks of two scalars, and the number of ranks with `stop` set: (3,).

    With one all-reduce. Every rank gets identical values, so decisions agree even where devices round differently.
    """
    # torch.tensor() would wait until the device has done all that it was given.
    stops = torch.full((), float(stop), device=loss.device)
    figures = sum_over_ranks(torch.stack((loss.float(), grad_norm.float(), stops)), runtime)
    if runtime.distributed:
        figures = figures.double()
        figures[:2] /= runtime.world_size
    return figures


def grad_norm_of(model: nn.Module) -> Tensor:
    """Return the L2 norm of all gradients, over all shards; the same value on every rank."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def weights_are_finite(model: nn.Module, runtime: Runtime) -> bool:
    """Tell whether the weights of all ranks are finite; the same answer on every rank."""
    norm = nn.utils.get_total_norm([p.detach() for p in model.parameters()])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return math.isfinite(sum_over_ranks(whole.clone(), runtime).item())


def require_agreement(facts: dict[str, Any], runtime: Runtime) -> None:
    """Raise UsageError on all ranks if the facts of a rank differ from those of rank 0; it names rank and keys."""
    if not runtime.distributed:
        return
    gathered = all_gather_json((socket.gethostname(), facts))
    _, expected = gathered[0]
    for rank, (host, actual) in enumerate(gathered):
        different = [key for key in expected if actual[key] != expected[key]]
        if different:
            raise UsageError(f"rank {rank} on {host} was started with another {', '.join(different)} than rank 0")


def broadcast_from_rank_zero(value: T, runtime: Runtime) -> T:
    """Return the value of rank 0 on every rank, as JSON has it."""
    return cast(T, all_gather_json(value if runtime.rank == 0 else None)[0]) if runtime.distributed else value


def sum_over_ranks(values: Tensor, runtime: Runtime) -> Tensor:
    """Sum elementwise over ranks, in place. Exact wherever at most one rank has a nonzero value."""
    if runtime.distributed:
        dist.all_reduce(values)
    return values


def all_gather_row(row: Sequence[float], runtime: Runtime) -> list[list[float]]:
    """Return the row of every rank, by rank. All rows have the same length."""
    rows = torch.zeros(runtime.world_size, len(row), dtype=torch.float64, device=runtime.float64_device)
    rows[runtime.rank] = torch.tensor(row, dtype=torch.float64)
    gathered: list[list[float]] = sum_over_ranks(rows, runtime).tolist()
    return gathered


def values_of_ranks(value: T, runtime: Runtime) -> list[T]:
    """Return the value of every rank, by rank, as JSON has it."""
    return all_gather_json(value) if runtime.distributed else [value]


def hosts_of_ranks(runtime: Runtime) -> list[str]:
    """Return the name of the host of every rank, by rank."""
    return values_of_ranks(socket.gethostname(), runtime)
