"""SIGSTOP of a random rank, or of all, at random moments: the rank is named, all are ended, and the run goes on."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from tests import jobs
from tests.storms import local_run
from tests.storms.conftest import Storm, Table

pytestmark = [pytest.mark.storm, jobs.linux_only]
LIMIT = 10.0


def have_ended(pids: Iterable[int]) -> bool:
    return not any(map(jobs.alive, pids))


def is_named(job: local_run.LocalRun, victim: str, *, more_than: int) -> bool:
    return job.output().count(f"{victim} of ") > more_than


@pytest.mark.timeout(4 * 3600)
def test_ranks_that_are_stopped_are_named_and_ended(
    prepared: Path, undisturbed: Callable[[int], Path], tmp_path: Path, storm: Storm, table: Table
) -> None:
    count = storm.size(short=1, long=50)
    steps = storm.steps(count)
    flags = (f"--train.steps={steps}", f"--health.timeout={LIMIT}")
    job = local_run.LocalRun(tmp_path / "storm", prepared, *flags, **jobs.FORKED_LAUNCHER)
    counted, ends = Counter[tuple[str, str]](), []
    for name, victim, pid in local_run.strikes(count, job, ("rank 0", "rank 1"), random.Random(storm.seed)):
        named, attempt = job.output().count(f"{victim} of "), {pid, *job.ranks().values()}
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        jobs.poll(partial(have_ended, attempt))
        ends.append(time.monotonic() - stopped)
        jobs.poll(partial(is_named, job, victim, more_than=named))
        counted[name, victim] += 1
    assert job.code() == 0, job.output()
    local_run.assert_same_run(job.run, undisturbed(steps))
    in_time = sum(seconds < LIMIT + 5 for seconds in ends)
    note = (
        f"{count} SIGSTOPs, health.timeout {LIMIT:.0f} s; all named; ended within "
        f"{max(ends):.1f} s, {in_time} of {count} within the timeout and 5 s"
    )
    for row in local_run.table_rows(counted, "SIGSTOP in"):
        table(note, row)


def test_ranks_that_are_all_stopped_are_ended(
    prepared: Path, undisturbed: Callable[[int], Path], tmp_path: Path, storm: Storm
) -> None:
    """No rank can name another, and torchrun, which sends SIGTERM, would wait for stopped ranks."""
    steps = storm.steps(2)
    flags = (f"--train.steps={steps}", f"--health.timeout={LIMIT}", "--run.fresh")
    job = local_run.LocalRun(tmp_path / "storm", prepared, *flags, **jobs.FORKED_LAUNCHER)
    for strike in (signal.SIGSTOP, signal.SIGKILL):
        local_run.wait_for_moment("step", job, random.Random(storm.seed))
        ranks = job.ranks()
        os.kill(ranks[0], signal.SIGSTOP)
        os.kill(ranks[1], strike)
        jobs.poll(partial(have_ended, ranks.values()))
    assert job.code() == 0, job.output()
    local_run.assert_same_run(job.run, undisturbed(steps))
