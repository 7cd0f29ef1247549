"""SIGKILL of a random rank or of the agent (torchrun) at random moments: the result is that of an uninterrupted run."""

import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests import jobs
from tests.storms import local_run
from tests.storms.conftest import Storm, Table

pytestmark = [pytest.mark.storm, jobs.linux_only]


def has_more_attempts(job: local_run.LocalRun, *, than: int) -> bool:
    return job.attempts() > than


@pytest.mark.timeout(4 * 3600)
def test_kills_change_nothing(
    prepared: Path, undisturbed: Callable[[int], Path], tmp_path: Path, storm: Storm, table: Table
) -> None:
    count = storm.size(short=2, long=200)
    steps = storm.steps(count)
    job = local_run.LocalRun(tmp_path / "storm", prepared, f"--train.steps={steps}")
    counted, recoveries = Counter[tuple[str, str]](), []
    for name, victim, pid in local_run.strikes(count, job, ("rank 0", "rank 1", "agent"), random.Random(storm.seed)):
        attempts = job.attempts()
        os.kill(pid, signal.SIGKILL)
        counted[name, victim] += 1
        if name == "step":
            struck = time.monotonic()
            jobs.poll(partial(has_more_attempts, job, than=attempts))
            recoveries.append(time.monotonic() - struck)
    assert job.code() == 0, job.output()
    local_run.assert_same_run(job.run, undisturbed(steps))
    took = f"{statistics.median(recoveries):.1f} s" if recoveries else "not measured"
    note = f"{count} SIGKILLs; median from a kill in a step until the run goes on: {took}"
    for row in local_run.table_rows(counted, "SIGKILL in"):
        table(note, row)
