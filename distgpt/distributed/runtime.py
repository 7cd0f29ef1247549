"""This rank: its place among the others, and its device."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from distgpt.errors import UsageError
from distgpt.torchrun import Place, place_in_job, this_attempt


@dataclass(frozen=True)
class Runtime:
    """The place of this rank among the others, and the device that it computes on."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    memory: float | None = None  # bytes of a device that this machine need not have; None: ask the device

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def on_one_host(self) -> bool:
        return self.world_size == self.local_world_size

    @property
    def float64_device(self) -> torch.device:
        """The device for sums in float64, which an Apple GPU does not have."""
        return torch.device("cpu") if self.device.type == "mps" else self.device


def this_rank(device: str = "auto") -> Runtime:
    """Read this rank from torchrun's environment; without it, one process. `device`: as train.device.

    Raises UsageError if the device is not here or cannot be used, or if there are fewer devices than ranks.
    """
    place = place_in_job()
    chosen = choose_device(device, place)
    return Runtime(place.rank, place.local_rank, place.world_size, place.local_world_size, chosen)


def choose_device(asked: str, place: Place) -> torch.device:
    """Return the device of this rank: as asked or, for auto, an NVIDIA GPU, else an Apple GPU, else the CPU.

    Raises UsageError.
    """
    if asked in ("auto", "cuda") and torch.cuda.is_available():
        if place.local_world_size > torch.cuda.device_count():
            raise UsageError(
                f"{place.local_world_size} ranks on this host but {torch.cuda.device_count()} GPUs: "
                f"use --nproc_per_node={torch.cuda.device_count()}"
            )
        return torch.device("cuda", place.local_rank)
    if asked in ("auto", "cuda") and gpus_are_expected():
        raise UsageError(
            f"this machine has NVIDIA GPUs, but PyTorch {torch.__version__} cannot use them ({why_not_cuda()}): update "
            "the driver, or install a PyTorch for an older CUDA; to use the CPU, set CUDA_VISIBLE_DEVICES=-1"
        )
    if asked in ("auto", "mps") and torch.backends.mps.is_available():
        if place.world_size > 1:
            raise UsageError(
                f"{place.world_size} ranks, but an Apple GPU trains with one: start python -m distgpt.train without "
                "torchrun, or take --train.device=cpu"
            )
        return torch.device("mps")
    if asked in ("cuda", "mps"):
        raise UsageError(f"the device is {asked}, but PyTorch {torch.__version__} finds none here: take auto or cpu")
    return torch.device("cpu")


def only_rank(command: str, device: str = "auto") -> Runtime:
    """Return the rank of a command that runs in one process. Raises UsageError under torchrun with several."""
    if place_in_job().world_size > 1:
        raise UsageError(f"{command} runs in one process: start it without torchrun")
    return this_rank(device)


def gpus_are_expected(devices: Path = Path("/dev")) -> bool:
    """Tell whether this machine has NVIDIA GPUs, this PyTorch is for them, and nobody has hidden them."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")
    return torch.version.cuda is not None and not hidden and any(devices.glob("nvidia[0-9]*"))


def why_not_cuda() -> str:
    """Return the first line of what CUDA says when it cannot start; torch falls back to the CPU without a word."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # its type differs between causes and versions of torch
        return str(error).partition("\n")[0].rstrip(". ") or type(error).__name__
    return "no GPU is visible"


def restarted() -> bool:
    """Tell whether torchrun has restarted the ranks of this job."""
    return this_attempt() > 0
