"""Send a stop signal at random moments: the run exits with 75, and no finished step is lost."""

import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import jobs
from tests.storms import local_run
from tests.storms.conftest import Storm, Table

pytestmark = [pytest.mark.storm, jobs.linux_only]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.mark.timeout(4 * 3600)
def test_signals_lose_nothing(
    prepared: Path, undisturbed: Callable[[int], Path], tmp_path: Path, storm: Storm, table: Table
) -> None:
    count = storm.size(short=2, long=100)
    steps = storm.steps(count)
    job = local_run.LocalRun(tmp_path / "storm", prepared, f"--train.steps={steps}")
    rng, counted = random.Random(storm.seed), Counter[tuple[str, str]]()
    for _ in range(count):
        jobs.poll(lambda: job.agent() or job.ended)  # until then a signal ends the launcher alone
        name, number = rng.choice(local_run.MOMENTS), rng.choice(SIGNALS)
        local_run.wait_for_moment(name, job, rng)
        assert not job.ended, job.output()
        reached = job.step()
        job.ask_to_stop(number)
        assert job.code() == 75, job.output()
        assert job.step() >= reached
        if job.step():
            assert jobs.checkpoints(job.run)[-1] == f"step-{job.step():08d}"
        counted[name, number.name] += 1
        job.start()
    assert job.code() == 0, job.output()
    local_run.assert_same_run(job.run, undisturbed(steps))
    note = f"{count} signals to launch/local.sh, each ended with 75 and all that was logged saved"
    for row in local_run.table_rows(counted, "signal in"):
        table(note, row)
