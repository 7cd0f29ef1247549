"""CPUs and GPUs of this machine: the quota of a container limits the CPUs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distgpt import machine, sample
from distgpt.cli import sample_options
from distgpt.distributed.device import threads_per_rank
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import Runtime
from distgpt.machine import available_cpus, available_gpus, default_ranks
from distgpt.prepare import parse
from tests import jobs

V2 = ("0::{}", "30 23 0:26 {} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw")
V1 = (
    "5:memory:/other\n3:cpu,cpuacct:{}\n1:name=systemd:/",
    "32 25 0:28 {} /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
)


@pytest.fixture(autouse=True)
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def make_root(root: Path, version: tuple[str, str], files: dict[str, str], *, group: str, mounted: str) -> Path:
    """Make a root directory in which this process is in `group`; what is below `mounted` is mounted."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(version[0].format(group) + "\n")
    mounts = ("24 1 0:22 / /sys rw - sysfs sysfs rw", version[1].format(mounted))
    (root / "proc/self/mountinfo").write_text("\n".join(mounts) + "\n")
    for name, content in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(content + "\n")
    return root


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 16), ("9900000 100000", 16)],
)
def test_a_container_of_control_groups_v2_limits_the_cpus(tmp_path: Path, quota: str, cpus: int) -> None:
    assert available_cpus(make_root(tmp_path, V2, {"cpu.max": quota}, group="/", mounted="/")) == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("300000", 3), ("-1", 16), ("40000", 1)])
@pytest.mark.parametrize("group", ["/", "/docker/4f2a"])
def test_a_container_of_control_groups_v1_limits_the_cpus(tmp_path: Path, quota: str, cpus: int, group: str) -> None:
    files = {"cpu/cpu.cfs_quota_us": quota, "cpu/cpu.cfs_period_us": "100000"}
    assert available_cpus(make_root(tmp_path, V1, files, group=group, mounted=group)) == cpus


def test_the_smallest_quota_of_a_group_and_its_parents_counts(tmp_path: Path) -> None:
    files = {"job.slice/cpu.max": "400000 100000", "job.slice/step/cpu.max": "max 100000"}
    assert available_cpus(make_root(tmp_path, V2, files, group="/job.slice/step", mounted="/")) == 4


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == 16


def test_a_real_control_group_limits_the_cpus() -> None:
    group = Path(f"/sys/fs/cgroup/cpu/distgpt-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("creating a control group needs root and control groups version 1")
    try:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("100000")
        program = (
            f"open('{group}/cgroup.procs', 'w').write('0')\nfrom distgpt.machine import *\nprint(available_cpus())"
        )
        done = jobs.run([sys.executable, "-c", program])
        assert done.stdout == "1\n", done
    finally:
        group.rmdir()


@pytest.fixture
def quota(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A container with a quota of 3 CPUs."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cpu_quotas", lambda root: [3.0])
    yield
    torch.set_num_threads(threads)


def test_threads_and_workers_respect_the_quota(quota: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [threads_per_rank(1), threads_per_rank(2)] == [3, 1]
    assert parse([]).workers == 3
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "")
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    with process_group(Runtime(0, 0, 1, 1, torch.device("cpu")), timeout=0):
        assert torch.get_num_threads() == 3
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "3"


def test_sample_respects_the_quota(quota: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(run: Path, device: torch.device, choice: str) -> None:
        raise InterruptedError

    monkeypatch.setattr(sample, "load_for_inference", stop)
    with pytest.raises(InterruptedError):
        sample.main(*sample_options(["run"]))
    assert torch.get_num_threads() == 3


def test_the_number_of_ranks_respects_the_quota(quota: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert default_ranks() == 2
    monkeypatch.setattr(machine, "cpu_quotas", lambda root: [1.5])
    assert default_ranks() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert (available_gpus(), default_ranks()) == (3, 3)
    assert default_ranks("cpu") == 1


def test_an_apple_gpu_has_one_rank(quota: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine, "has_apple_gpu", lambda: True)
    assert [default_ranks(device) for device in ("auto", "mps", "cpu")] == [1, 1, 2]
