"""This rank: its place among the others, and its device."""

from dataclasses import dataclass

import torch

from distgpt.errors import UsageError
from distgpt.torchrun import place_in_job, this_attempt


@dataclass(frozen=True)
class Runtime:
    """The place of this rank among the others, and the device that it computes on."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def on_one_host(self) -> bool:
        return self.world_size == self.local_world_size


def this_rank() -> Runtime:
    """Read this rank from torchrun's environment; without it, one process. Raises UsageError for lack of GPUs."""
    place = place_in_job()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if place.local_world_size > torch.cuda.device_count():
            raise UsageError(
                f"{place.local_world_size} ranks on this host but {torch.cuda.device_count()} GPUs: "
                f"use --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", place.local_rank)
    return Runtime(place.rank, place.local_rank, place.world_size, place.local_world_size, device)


def only_rank(command: str) -> Runtime:
    """Return the rank of a command that runs in one process. Raises UsageError under torchrun with several."""
    runtime = this_rank()
    if runtime.distributed:
        raise UsageError(f"{command} runs in one process: start it without torchrun")
    return runtime


def restarted() -> bool:
    """Tell whether torchrun has restarted the ranks of this job."""
    return this_attempt() > 0
