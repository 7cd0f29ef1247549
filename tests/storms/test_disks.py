"""Disks, files and clocks that fail: the run goes on, or ends with the right exit code, and prints one clear line.

See also tests/end_to_end: a full disk and signals in test_endings.py, mistakes of users in test_bad_input.py.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distgpt.corpus.shards import Dataset
from tests import jobs
from tests.checkpoint.checkpoints import trainee
from tests.end_to_end.conftest import tiny
from tests.storms.conftest import Table

pytestmark = pytest.mark.storm
TITLE = "Disks, files and clocks"

# A sitecustomize.py with which the clock seems to be set back by a day.
CLOCK_SET_BACK = """
import time
now, now_ns = time.time, time.time_ns
time.time, time.time_ns = lambda: now() - 86400, lambda: now_ns() - 86400 * 10**9
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with jobs.disk(tmp_path / "disk", "size=4m") as disk:
        yield disk


def test_training_goes_on_while_the_disk_is_read_only(dataset: Dataset, small_disk: Path, table: Table) -> None:
    subject = trainee(small_disk, dataset)
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.require_saved(1)
    remount(small_disk, "ro")
    subject.checkpointer.save(2, val_loss=None)
    subject.checkpointer.wait()
    (line,) = subject.messages
    assert line.startswith("CHECKPOINT NOT SAVED, training goes on: Read-only file system: ")
    remount(small_disk, "rw")
    subject.checkpointer.save(3, val_loss=None)
    subject.checkpointer.require_saved(3)
    assert jobs.checkpoints(small_disk) == ["step-00000001", "step-00000003"]
    assert trainee(small_disk, dataset).checkpointer.restore() == 3
    table(TITLE, {"what fails": "the disk becomes read-only in mid-run", "what happens": "goes on", "says": line})


def test_a_full_disk_of_tensorboard_loses_its_curves_alone(prepared: Path, tmp_path: Path, table: Table) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with jobs.disk(run / "tb", "size=64k") as disk:
        jobs.fill(disk / "filler")
        ended = jobs.command("train", *tiny(prepared, run), "--train.steps=8", "--eval.every=4")
    assert ended.code == 0, ended
    assert ended.stderr.count("metrics are being lost, training goes on: ") == 1, ended
    assert ended.stderr.count("\n") == 1, ended
    assert list(jobs.losses(run)) == list(range(1, 9))
    line = ended.stderr.strip().replace(str(tmp_path), "")
    table(TITLE, {"what fails": "TensorBoard's disk is full", "what happens": "goes on", "says": line})


def test_a_run_resumes_with_a_damaged_config_file_and_a_clock_set_back(
    prepared: Path, tmp_path: Path, table: Table
) -> None:
    """A resumed run does not read its config.toml, which is for people. Given as an argument, it must be valid."""
    run = tmp_path / "run"
    arguments = tiny(prepared, run)
    first = jobs.command("train", *arguments, "--train.steps=4")
    assert first.code == 0, first
    (run / "config.toml").write_bytes(b"\x00\xff[[[")
    given = jobs.command("train", str(run / "config.toml"), *arguments)
    assert given.code == 2, given
    assert given.stderr.count("\n") == 1, given
    assert given.stderr.startswith(f"distgpt: error: cannot read {run / 'config.toml'}: ")
    (tmp_path / "sitecustomize.py").write_text(CLOCK_SET_BACK)
    again = jobs.command("train", *arguments, "--train.steps=8", PYTHONPATH=str(tmp_path))
    assert (again.code, again.stderr) == (0, ""), again
    assert f"going on from step 4 in {run}" in again.stdout
    assert list(jobs.losses(run)) == list(range(1, 9))
    assert b"\xff" not in (run / "config.toml").read_bytes()
    assert jobs.checkpoints(run)[-1] == "step-00000008"
    line = given.stderr.strip().replace(str(tmp_path), "")
    table(TITLE, {"what fails": "a damaged config.toml is given", "what happens": "2", "says": line})
    table(TITLE, {"what fails": "the clock is set back by a day", "what happens": "goes on, exactly", "says": ""})


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)
