"""Jobs with a rank that is slow on purpose, or has slow data or a slow disk, and one with equal ranks."""

import signal
import socket
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import jobs
from tests.end_to_end.conftest import tiny


def job(data: Path, run: Path, slow: str, *arguments: str) -> jobs.Job:
    slow_py = Path(__file__).with_name("slow.py")
    quiet = ("--eval.every=0", "--checkpoint.every=0", "--train.steps=10000")
    return jobs.Job(jobs.torchrun_command(2, *tiny(data, run), *quiet, *arguments, script=slow_py), SLOW=slow)


def stop(started: jobs.Job) -> str:
    """Ask a job to end. Returns its stdout."""
    started.signal(signal.SIGTERM)
    return started.finish().stdout


@jobs.linux_only
def test_a_slow_rank_is_named_with_its_host(prepared: Path, tmp_path: Path) -> None:
    started = job(prepared, tmp_path, "forward:0.1:1")
    started.read_until(f"rank 1 on {socket.gethostname()} is slow: its own work takes 2")  # 200 ms and a little
    assert "rank 0 on " not in stop(started)
    assert f"rank 1 on {socket.gethostname()} is slow: " in (tmp_path / "logs" / "rank-0.log").read_text()


@jobs.linux_only
def test_slow_data_is_named_with_its_rank(prepared: Path, tmp_path: Path) -> None:
    # Four sequences a step. A sharded model is the harder case.
    started = job(prepared, tmp_path, "read:0.05:0", "--parallel.strategy=fsdp")
    started.read_until(f"rank 0 on {socket.gethostname()} is slow: ")
    started.read_until("; data wait ")
    assert "rank 1 on " not in stop(started)
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    waits = [event.value for event in accumulator.Scalars("ranks/data_wait_s_longest")]
    assert max(waits) > 0.1


@jobs.linux_only
def test_a_slow_disk_is_named_with_its_rank(prepared: Path, tmp_path: Path) -> None:
    """Training waits for saves equally on all ranks."""
    started = job(prepared, tmp_path, "save:1:1", "--checkpoint.every=1")
    host = socket.gethostname()
    started.read_until(f"rank 1 on {host} is slow to save: ")
    # Rank 0 commits a checkpoint each step on a busy core, so its own work may be slow, but not its saves.
    assert f"rank 0 on {host} is slow to save: " not in stop(started)


@jobs.linux_only
def test_no_rank_is_named_if_all_are_equally_slow(prepared: Path, tmp_path: Path) -> None:
    started = job(prepared, tmp_path, "forward:0.1:")
    started.read_until("step    50/10000 ")  # ten seconds
    assert " is slow: " not in stop(started)
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    own = [event.value for event in accumulator.Scalars("ranks/own_work_s_median")]
    assert min(own) >= 0.2
