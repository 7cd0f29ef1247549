"""The CPUs and GPUs of this machine that this process may use. Imports no torch."""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """Return how many CPUs this process may use, by its affinity and the quota of its container; at least 1.

    `root`: the directory that contains proc and sys.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Rounded down: the kernel stops threads beyond the quota for a while, and the other threads wait for them.
    return max(1, math.floor(min([cpus, *cpu_quotas(root)])))


def available_gpus() -> int:
    """Return how many NVIDIA GPUs CUDA can use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def cpu_has_one_of(flags: set[str]) -> bool:
    """Tell whether /proc/cpuinfo names one of these flags, each of which stands for a group of instructions."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return not flags.isdisjoint(cpuinfo.read().split())
    except OSError:
        return False


def has_apple_gpu() -> bool:
    """Tell whether this is a Mac with a GPU that PyTorch can use."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def default_ranks(device: str = "auto") -> int:
    """Return the default number of ranks on train.device.

    One for each NVIDIA GPU, else one for an Apple GPU, else two that share the CPUs, or one on one CPU.
    """
    if device in ("auto", "cuda") and (gpus := available_gpus()):
        return gpus
    return 1 if device in ("auto", "mps") and has_apple_gpu() else min(2, available_cpus())


def cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of the control groups of this process and of their parents."""
    for group in _control_groups(root):
        try:
            if (group / "cpu.max").exists():  # version 2
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) / int(period)
        except (OSError, ValueError):
            continue  # a group without a limit ("max", -1), or without this file


def _control_groups(root: Path) -> Iterator[Path]:
    """Yield the directories of the control groups that can limit the CPUs of this process."""
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (root / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return
    with_cpu = [(number, path) for number, names, path in groups if not names or "cpu" in names.split(",")]
    paths = {"cgroup2" if number == "0" else "cgroup": path for number, path in with_cpu}
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        if kind not in paths or (kind == "cgroup" and "cpu" not in options):
            continue
        # In a container, the path of the group may be that on the host, although only its end is mounted.
        inside, top = os.path.relpath(paths[kind], mount[3]), root / mount[4].lstrip("/")
        group = top if inside.startswith("..") else top / inside
        yield from (directory for directory in (group, *group.parents) if directory.is_relative_to(top))
