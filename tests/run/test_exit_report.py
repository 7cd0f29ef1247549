"""exit.json: the first report of the end of a run wins."""

import errno
import json
import os
import socket
from datetime import datetime
from pathlib import Path

import pytest

from distgpt.errors import UsageError
from distgpt.run.exit_report import remove_report_of_last_attempt, report_of_this_job, write_exit_report
from distgpt.run.paths import RunPaths


def report(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "exit.json").read_text())
    return found


def test_the_first_report_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTGPT_EXIT_FILE", raising=False)
    paths = RunPaths(tmp_path)
    assert write_exit_report(paths, code=65, cause="the loss", rank=1, step=7)
    assert not write_exit_report(paths, code=75, cause="lost contact", rank=0, step=7)
    found = report(tmp_path)
    assert found.pop("time")
    assert found.pop("host") == socket.gethostname()
    assert found == {"code": 65, "cause": "the loss", "rank": 1, "step": 7, "fence": 0, "job": None}
    assert [file.name for file in tmp_path.iterdir()] == ["exit.json"]


def test_a_report_of_a_new_owner_replaces_one_of_a_suspended_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTGPT_EXIT_FILE", str(tmp_path / "copy.json"))
    paths = RunPaths(tmp_path)
    assert write_exit_report(paths, code=0, cause="done", rank=0, step=9, fence=3)
    assert write_exit_report(paths, code=74, cause="disk", rank=0, step=7, fence=4)
    assert report(tmp_path)["code"] == 74
    assert not write_exit_report(paths, code=0, cause="done", rank=0, step=9, fence=3)
    assert not write_exit_report(paths, code=75, cause="lost contact", rank=1, step=7, fence=4)
    assert report(tmp_path)["code"] == 74
    # In the launcher's file the first report always wins.
    assert json.loads((tmp_path / "copy.json").read_text())["code"] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.json", "exit.json"]


def test_a_launcher_gets_a_copy_even_without_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTGPT_EXIT_FILE", str(tmp_path / "copy.json"))
    assert write_exit_report(None, code=73, cause="in use", rank=0, step=None)
    assert not write_exit_report(None, code=75, cause="interrupted", rank=1, step=None)
    assert json.loads((tmp_path / "copy.json").read_text())["code"] == 73
    assert write_exit_report(RunPaths(tmp_path), code=0, cause="done", rank=0, step=1)
    assert json.loads((tmp_path / "copy.json").read_text())["code"] == 73


def test_a_report_that_cannot_be_written_is_still_to_be_printed(tmp_path: Path) -> None:
    assert write_exit_report(RunPaths(tmp_path / "gone"), code=74, cause="disk", rank=0, step=None)


def test_only_reports_of_earlier_attempts_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy.json"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("DISTGPT_EXIT_FILE", str(copy))
    assert write_exit_report(None, code=75, cause="a host joined", rank=0, step=None)
    remove_report_of_last_attempt()
    assert copy.exists()
    written = json.loads(copy.read_text())
    copy.write_text(json.dumps({**written, "time": "2001-01-01T00:00:00+0000"}))  # before this process
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    remove_report_of_last_attempt()
    assert copy.exists()
    monkeypatch.undo()
    monkeypatch.setenv("DISTGPT_EXIT_FILE", str(copy))
    remove_report_of_last_attempt()
    assert not copy.exists()


def test_a_rank_that_starts_late_keeps_the_report_of_its_own_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine a rank may have failed and reported before the last rank of the attempt has started."""
    copy = tmp_path / "copy.json"
    error_file = tmp_path / "attempt_1" / "3" / "error.json"
    error_file.parent.mkdir(parents=True)
    monkeypatch.setenv("DISTGPT_EXIT_FILE", str(copy))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    assert write_exit_report(None, code=65, cause="the loss", rank=0, step=None)
    written = datetime.fromisoformat(json.loads(copy.read_text())["time"]).timestamp()
    for seconds_after_torchrun, stays in ((1, True), (-1, False)):
        os.utime(copy, (1000, 1000))  # the clock of a file server may be wrong
        os.utime(error_file.parents[1], (written - seconds_after_torchrun, written - seconds_after_torchrun))
        remove_report_of_last_attempt()
        assert copy.exists() == stays


def test_the_first_report_wins_on_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.delenv("DISTGPT_EXIT_FILE", raising=False)
    monkeypatch.setattr(os, "link", refuse)
    paths = RunPaths(tmp_path)
    assert write_exit_report(paths, code=65, cause="the loss", rank=1, step=7, fence=1)
    assert not write_exit_report(paths, code=75, cause="lost contact", rank=0, step=7, fence=1)
    assert report(tmp_path)["code"] == 65
    assert [file.name for file in tmp_path.iterdir()] == ["exit.json"]


def test_a_report_belongs_only_to_the_job_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every torchrun without --rdzv-id has the id "none"."""
    monkeypatch.delenv("DISTGPT_EXIT_FILE", raising=False)
    for job, known_to_the_next in (("none", None), ("mine", (65, "the loss"))):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
        paths = RunPaths(tmp_path / job)
        paths.root.mkdir()
        write_exit_report(paths, code=65, cause="the loss", rank=0, step=7)
        assert report_of_this_job(paths) == (65, "the loss")
        with monkeypatch.context() as another:
            another.setattr(os, "getppid", lambda: 1)
            assert report_of_this_job(paths) == known_to_the_next


def test_a_directory_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UsageError, match=r"run\.dir is 'runs/\\udcff', which is not UTF-8"):
        RunPaths(Path(os.fsdecode(b"runs/\xff")))
