"""Endings of attempts, and the next action of the launchers."""

import json
from pathlib import Path

import pytest

from distgpt.launch import policy
from distgpt.launch.policy import Ending, Tries, can_retry, newest_checkpoint
from distgpt.launch.settings import count_from_environment
from distgpt.run.exit_report import read_report


@pytest.mark.parametrize(
    ("code", "expected"), [(0, False), (None, True), (75, True), *((code, False) for code in (2, 65, 70, 73, 74))]
)
def test_only_what_was_interrupted_starts_again(code: int | None, expected: bool) -> None:
    assert can_retry(code) == expected


def test_a_lock_that_may_be_ours_is_waited_for() -> None:
    assert can_retry(73, lock_may_be_ours=True)
    assert not can_retry(2, lock_may_be_ours=True)


def test_attempts_count_while_there_is_no_new_checkpoint(tmp_path: Path) -> None:
    tries = Tries(2, tmp_path)
    assert not tries.count_failure()
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert not tries.count_failure()
    assert (tries.count, tries.newest) == (0, "step-00000004")
    assert not tries.count_failure()
    assert tries.count_failure()


def test_the_newest_checkpoint_is_committed(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000010", "step-00000009", ".staging-x", "broken-step-00000011"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == "step-00000010"


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"code": null, "cause": ""}', '{"code": 2}'])
def test_a_report_that_is_not_whole_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "exit.json").write_text(text)
    assert read_report(tmp_path / "exit.json") is None
    assert read_report(tmp_path / "missing.json") is None


def test_the_cause_is_the_ranks_own(tmp_path: Path) -> None:
    report = {"code": 75, "cause": "lost rank 1, run it again to go on", "step": None}
    (tmp_path / "exit.json").write_text(json.dumps(report))
    ending = Ending.from_report(read_report(tmp_path / "exit.json"), otherwise="killed")
    assert ending == Ending(75, "lost rank 1, run it again to go on", 0)
    assert ending.cause_without_advice == "lost rank 1"
    assert Ending.from_report(None, otherwise="killed") == Ending(None, "killed")


def test_a_count_that_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIES", "")
    assert count_from_environment("TRIES") is None
    monkeypatch.setenv("TRIES", "12")
    assert count_from_environment("TRIES") == 12


def test_a_disk_that_cannot_be_read_is_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    tries = Tries(2, tmp_path)

    def failing(run_dir: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(policy, "newest_checkpoint", failing)
    assert [tries.count_failure(), tries.count_failure()] == [False, True]
    assert tries.newest == "step-00000001"
