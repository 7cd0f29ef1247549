"""Threads, memory, precision and compiler of this rank's device."""

import ctypes
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from distgpt.config import TrainConfig
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.machine import available_cpus, cpu_has_one_of

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
# Flags in /proc/cpuinfo of CPUs on which products of bfloat16 matrices take at most half the time of float32 ones.
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}


def threads_per_rank(local_world_size: int) -> int:
    """Return OMP_NUM_THREADS, or an even share of the CPUs if it is unset or the 1 that torchrun sets by default."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and (int(asked) > 1 or "TORCHELASTIC_RUN_ID" not in os.environ):
        return max(1, int(asked))
    return share_of_cpus(local_world_size)


def share_of_cpus(local_world_size: int) -> int:
    """Return an even share of the CPUs that this process may use, at least 1."""
    return max(1, available_cpus() // local_world_size)


def compute_dtype(asked: str, device: torch.device) -> torch.dtype:
    """Resolve `train.dtype`: auto is bfloat16 on NVIDIA GPUs and CPUs that have instructions for it, else float32.

    It is not measured: a measurement on a busy machine may differ from one attempt of a run to the next. Raises
    UsageError.
    """
    if device.type == "mps":
        if asked == "bfloat16" and not torch.backends.mps.is_macos_or_newer(14, 0):  # autocast would be off
            raise UsageError("bfloat16 on an Apple GPU needs macOS 14: take --train.dtype=float32")
        return torch.bfloat16 if asked == "bfloat16" else torch.float32
    if asked != "auto":
        return torch.bfloat16 if asked == "bfloat16" else torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):  # is_bf16_supported looks at the current device
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = cpu_has_one_of(BFLOAT16_FLAGS)
    return torch.bfloat16 if fast else torch.float32


def compiles(asked: bool | Literal["auto"], device: torch.device) -> tuple[bool, str]:
    """Resolve `train.compile` and give the reason, to be shown to the user. Raises UsageError if it cannot work.

    auto: on for GPUs, where it fuses what moves most bytes; off for CPUs, where it is slower.
    """
    if asked is False or (asked == "auto" and device.type != "cuda"):
        return False, ""
    missing = missing_for_triton() if device.type == "cuda" else ""
    if missing and asked is True:
        raise UsageError(f"train.compile needs {missing}: install it, or set train.compile=false")
    return not missing, f"not compiled, and so slower: {missing} is missing" if missing else "compiled"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else f"threads: {torch.get_num_threads()} each"


def set_numerics(train: TrainConfig, *, exact: bool = False) -> None:
    """Set for this process how float32 products are rounded on GPUs, and which kernels may be used.

    `exact`: the same kernels in the same order on any number of ranks.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32" if train.tf32 else "ieee"
    if exact:
        torch.set_num_threads(1)  # kernels on a CPU add up in an order that depends on it
    if train.deterministic or exact:
        # cuBLAS is deterministic with a fixed workspace. It reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Filling new tensors costs time, and only helps to find bugs.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def missing_for_triton() -> str:
    """Say what Triton, which compiles for GPUs, lacks on this machine; empty if nothing."""
    if not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
        return "a C compiler (gcc, clang, or the one that the variable CC names)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"{header} (the package python3-dev or python3-devel)"


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks: returning them to the kernel costs a page fault per page, every step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 256 * 2**20)


def device_memory(runtime: Runtime) -> float:
    """Return the bytes of memory that this rank may use."""
    if runtime.memory is not None:
        return runtime.memory
    if runtime.device.type == "cuda":
        return float(torch.cuda.get_device_properties(runtime.device).total_memory)
    if runtime.device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / runtime.local_world_size
