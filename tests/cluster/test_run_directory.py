"""The lock on a run directory and the first report of how a run ended."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distgpt.cluster.run_directory import RunLock, RunPaths, write_exit_report
from distgpt.errors import DirectoryError

HOLD = """
import sys
from pathlib import Path
from distgpt.cluster.run_directory import RunLock, RunPaths
lock = RunLock(RunPaths(Path(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""


def report(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "exit.json").read_text())
    return found


def test_a_second_owner_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "deep" / "run")
    lock = RunLock(paths)
    paths.exit_report.write_text("{}")
    with pytest.raises(DirectoryError) as caught:
        RunLock(paths)
    owner = rf"in use by pid {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(owner, str(caught.value))
    assert str(paths.root) in str(caught.value)
    assert paths.exit_report.exists()  # the owner's
    del lock


def test_the_lock_is_free_after_the_owner_was_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(DirectoryError, match=rf"pid {owner.pid} on"):
            RunLock(RunPaths(tmp_path))
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        RunLock(RunPaths(tmp_path))
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()


def test_a_lock_without_a_readable_owner_is_still_a_lock(tmp_path: Path) -> None:
    lock = RunLock(RunPaths(tmp_path))
    (tmp_path / "LOCK").write_text("???")
    with pytest.raises(DirectoryError, match="in use by another job"):
        RunLock(RunPaths(tmp_path))
    del lock


def test_a_new_owner_forgets_how_the_last_run_ended(tmp_path: Path) -> None:
    write_exit_report(RunPaths(tmp_path), code=75, cause="interrupted", rank=0, step=3)
    RunLock(RunPaths(tmp_path))
    assert not (tmp_path / "exit.json").exists()


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(DirectoryError, match=rf"cannot write to the run directory {root}: .*--run.dir=DIR"):
            RunLock(RunPaths(root))


def test_the_first_report_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTGPT_EXIT_FILE", raising=False)
    paths = RunPaths(tmp_path)
    assert write_exit_report(paths, code=65, cause="the loss", rank=1, step=7)
    assert not write_exit_report(paths, code=75, cause="lost contact", rank=0, step=7)
    found = report(tmp_path)
    assert found.pop("time")
    assert found == {"code": 65, "cause": "the loss", "rank": 1, "step": 7, "job": None}
    assert [file.name for file in tmp_path.iterdir()] == ["exit.json"]


def test_a_launcher_gets_a_copy_even_without_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTGPT_EXIT_FILE", str(tmp_path / "copy.json"))
    assert write_exit_report(None, code=73, cause="in use", rank=0, step=None)
    assert not write_exit_report(None, code=75, cause="interrupted", rank=1, step=None)
    assert json.loads((tmp_path / "copy.json").read_text())["code"] == 73
    assert write_exit_report(RunPaths(tmp_path), code=0, cause="done", rank=0, step=1)
    assert json.loads((tmp_path / "copy.json").read_text())["code"] == 73


def test_a_report_that_cannot_be_written_is_still_to_be_told(tmp_path: Path) -> None:
    assert write_exit_report(RunPaths(tmp_path / "gone"), code=74, cause="disk", rank=0, step=None)
