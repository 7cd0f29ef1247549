"""The CPUs and GPUs of this machine that this process may use. Imports no torch."""

import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """Count the CPUs that this process may use, by its affinity and the quota of its container. At least 1.

    `root`: the directory that holds proc and sys.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Rounded down: threads beyond the quota would be stopped in turn while the others wait for them.
    return max(1, math.floor(min([cpus, *cpu_quotas(root)])))


def available_gpus() -> int:
    """Count the NVIDIA GPUs that CUDA would see."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1", "NoDevFiles")])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def default_ranks() -> int:
    """Return the ranks to start here: one for each GPU, else two, which share the CPUs, or one on a single CPU."""
    return available_gpus() or min(2, available_cpus())


def cpu_quotas(root: Path) -> Iterator[float]:
    """Yield the quota, in CPUs, of each control group that this process is in, parents included."""
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
    paths = {"cgroup2" if number == "0" else "cgroup": path for number, names, path in groups if _has_cpu(names)}
    for mount in mounts:
        kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
        if kind not in paths or (kind == "cgroup" and "cpu" not in options):
            continue
        # A container may see the path of its group on the host, of which only the end is mounted.
        inside, top = os.path.relpath(paths[kind], mount[3]), root / mount[4].lstrip("/")
        group = top if inside.startswith("..") else top / inside
        yield from (directory for directory in (group, *group.parents) if directory.is_relative_to(top))


def _has_cpu(controllers: str) -> bool:
    return not controllers or "cpu" in controllers.split(",")
