"""Two jobs on one run directory, on two hosts: while one is suspended the other takes over; then the first one ends."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distgpt.run.lock import BOOT_ID
from tests import jobs
from tests.end_to_end.conftest import Trained, tiny

# The command seems to run on another kernel, for which the flock alone does not decide.
ELSEWHERE = ("unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"')


@pytest.fixture
def elsewhere(tmp_path: Path) -> list[str]:
    """Return the beginning of a command line that runs on another host. Skips the test where that is impossible."""
    boot = tmp_path / "boot_id"
    boot.write_text("00000000-0000-0000-0000-000000000000\n")
    command = [*ELSEWHERE, str(boot), str(BOOT_ID)]
    if sys.platform != "linux" or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("another host takes root on Linux")
    return command


@jobs.linux_only
def test_a_job_that_wakes_up_after_another_took_over(
    whole: Callable[[str], Trained], prepared: Path, tmp_path: Path, elsewhere: list[str]
) -> None:
    run, report = tmp_path / "run", tmp_path / "exit.json"
    arguments = tiny(prepared, run)
    command = [*elsewhere, *jobs.torchrun_command(2, *arguments, "--parallel.strategy=ddp")]
    job = jobs.Job(command, DISTGPT_EXIT_FILE=str(report))
    job.read_until("step  7/36 ")
    jobs.poll((run / "checkpoints" / "step-00000006").is_dir)
    stopped = [job.pid, job.rank(0), job.rank(1)]
    assert owner(run) == (stopped[1], 1)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)

    # The lease of the suspended job expires meanwhile.
    second = jobs.command("train", *arguments)
    assert second.code == 0, second
    before = contents(run)
    assert owner(run)[1] == 2

    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    ended = job.finish()
    assert ended.code != 0
    line = f"lost the run directory {run} to pid {owner(run)[0]} on "
    assert len(ended.error_lines) == 1, ended
    assert ended.error_lines[0].startswith(f"distgpt: error: {line}")
    assert ended.traceback == []
    assert json.loads(report.read_text())["code"] == 73
    assert contents(run) == before
    assert jobs.exit_report(run)["code"] == 0
    assert jobs.losses(run) == pytest.approx(jobs.losses(whole("single").run), abs=1e-4)


def owner(run: Path) -> tuple[int, int]:
    """Return the process id and the fence of the owner."""
    record = json.loads((run / "LOCK").read_text())
    return record["pid"], record["fence"]


def contents(run: Path) -> dict[str, str]:
    """Read every file except logs, which may grow."""
    files = [file for file in run.rglob("*") if file.is_file() and file.parent.name != "logs"]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
