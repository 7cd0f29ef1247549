"""A job that chooses its save interval, is killed, and goes on: its weights do not depend on that."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from distgpt.telemetry.goodput import Line
from tests import jobs
from tests.end_to_end.conftest import Trained, tiny

# A run that failed so often that it expects the next failure in 4 seconds, and saves twice a second or so.
FAILURES = 20_000


@jobs.linux_only
def test_the_save_interval_follows_failures_and_the_run_resumes_exactly(
    whole: Callable[[str], Trained], prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = (json.dumps(asdict(Line(attempt, at=0.0, step=0))) for attempt in range(FAILURES))
    (run / "goodput.jsonl").write_text("\n".join(lines) + "\n")
    auto = ("--checkpoint.every=auto", "--eval.every=0", "--train.steps=100000", "--parallel.strategy=ddp")
    command = jobs.torchrun_command(2, *tiny(prepared, run), *auto)

    job = jobs.Job(command)
    job.read_until("checkpoints every ")
    job.read_until(" of training, a failure is expected every 4s\n")
    step = 36
    job.read_until(f"step {step:>6}/100000 ")
    while not list((run / "checkpoints").glob("step-*")):
        step += 1
        job.read_until(f"step {step:>6}/100000 ")
    os.kill(job.rank(1), signal.SIGKILL)
    job.finish()
    before = jobs.losses(run)

    job = jobs.Job(command)
    job.read_until("going on from step ")
    job.read_until(f"step {max(before):>6}/100000 ")
    job.ask_to_stop(signal.SIGTERM)
    job.finish()
    assert jobs.exit_report(run)["code"] == 75
    after = jobs.losses(run)
    assert {step: after[step] for step in before} == before
    reference = jobs.losses(whole("ddp").run)
    assert {step: after[step] for step in reference} == reference
