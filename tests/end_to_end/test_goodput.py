"""The current of a real job that is killed and restarted, against a clock outside of it."""

import os
import re
import signal
import statistics
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distgpt.telemetry.goodput import read_goodput, time_spent
from tests import jobs
from tests.end_to_end.conftest import tiny

# A step has two micro-batches on each of two ranks, an evaluation eight forwards.
FORWARD_SECONDS = 0.05


class Watched:
    """An attempt seen from outside: the time when rank 0 began, and when each step was printed."""

    def __init__(self, arguments: list[str]) -> None:
        command = jobs.torchrun_command(2, *arguments, script=Path(__file__).with_name("slow.py"))
        self.job = jobs.Job(command, SLOW=f"forward:{FORWARD_SECONDS}:")
        self.rank_0 = self.job.rank(0)
        # From the start time in /proc, since polling finds a rank late on a busy machine.
        self.began = time.monotonic() - age(self.rank_0)
        self.printed: dict[int, float] = {}

    def read_step(self, step: int) -> None:
        self.job.read_until(f"step {step:>2}/36 | loss ")
        self.printed[step] = time.monotonic()

    def between(self, first: int, last: int) -> float:
        return self.printed[last] - self.printed[first]


def age(pid: int) -> float:
    """Return the seconds since a process was started."""
    started = int(jobs.stat_of(pid)[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


@jobs.linux_only
def test_the_file_agrees_with_a_clock_outside(prepared: Path, tmp_path: Path) -> None:
    arguments = tiny(prepared, tmp_path)
    killed = Watched(arguments)
    for step in range(1, 21):
        killed.read_step(step)
    jobs.poll((tmp_path / "checkpoints" / "step-00000018").is_dir)
    os.kill(killed.rank_0, signal.SIGKILL)
    killed_at = time.monotonic()
    lines = read_goodput(tmp_path / "goodput.jsonl")
    killed.job.finish()

    finished = Watched(arguments)
    for step in range(19, 37):
        finished.read_step(step)
    finished.job.read_until("goodput   ")
    ended_at = time.monotonic()
    ended = finished.job.finish()
    assert ended.code == 0, ended

    spent = time_spent(read_goodput(tmp_path / "goodput.jsonl"))
    total = ended_at - killed.began
    assert spent.total == pytest.approx(total, rel=0.01, abs=0.5)
    steps = [finished.between(step - 1, step) for step in range(20, 37) if step != 25]
    one_step = statistics.median(steps)
    steps += [killed.between(step - 1, step) for step in range(2, 21) if step != 13]
    # The tolerance on a busy machine follows from the steps, most of which take equally long. From outside, saves after
    # the last step look like evaluation.
    saves = spent.seconds["checkpoint"] + spent.seconds["other"]
    tolerance = 0.02 * total + 2 * (max(steps) - one_step)
    seen = {
        "start": killed.printed[1] - killed.began + finished.printed[19] - finished.began,
        "recovery": finished.began - killed_at,
        "repeated": killed.between(18, 20),
        "evaluation": killed.between(12, 13)
        + finished.between(24, 25)
        - 2 * one_step
        + ended_at
        - finished.printed[36],
    }
    seen["steps"] = killed.between(1, 12) + killed.between(13, 18) + one_step
    seen["steps"] += finished.between(19, 24) + finished.between(25, 36) + one_step
    for part, seconds in seen.items():
        late = saves if part == "evaluation" else 0.0
        assert spent.seconds[part] == pytest.approx(seconds, abs=tolerance + late), part
    assert spent.seconds["data_wait"] + saves < 0.05 * total + tolerance
    assert 0 < spent.goodput < 1
    assert (spent.attempts, spent.failures) == (2, 1)

    # The lines from before the kill are kept, and cover the attempt except for one interval.
    assert read_goodput(tmp_path / "goodput.jsonl")[: len(lines)] == lines
    assert lines[-1].spent == pytest.approx(killed_at - killed.began, abs=tolerance)
    assert re.search(r"^goodput   \d+\.\d% of \d.* in 2 attempts: start ", ended.stdout, re.MULTILINE)
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    shown = {event.step: event.value for event in accumulator.Scalars("time/recovery_s")}
    assert shown[18] == 0.0
    assert shown[36] == pytest.approx(spent.seconds["recovery"], abs=0.01)
