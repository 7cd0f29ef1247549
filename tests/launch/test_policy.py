"""Endings of attempts: which of them are tried again, and how often."""

import json
from pathlib import Path

import pytest

from distgpt.errors import UsageError
from distgpt.launch.policy import Ending, Tries, count_from_environment, read_ending
from distgpt.run.paths import RunPaths


def checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(("code", "retryable"), [(0, False), (2, False), (65, False), (70, False), (75, True)])
def test_only_an_interruption_is_tried_again(code: int, retryable: bool) -> None:
    assert Ending(code, "why").retryable == retryable


def test_a_cause_loses_the_advice_that_a_launcher_follows_itself() -> None:
    assert Ending(75, "rank 1 is gone: run it again to go on").reason == "rank 1 is gone"
    assert Ending(75, "step 3 is saved, run it again to go on").reason == "step 3 is saved"
    assert Ending(65, "bad data: run it again to go on").reason == "bad data: run it again to go on"


def test_attempts_without_a_new_checkpoint_are_counted(tmp_path: Path) -> None:
    tries = Tries(2, RunPaths(tmp_path))
    assert not tries.exhausted()
    checkpoint(tmp_path, 1)
    assert not tries.exhausted()
    assert (tries.count, tries.newest_checkpoint) == (0, "step-00000001")
    assert [tries.exhausted(), tries.exhausted()] == [False, True]


def test_a_report_that_is_missing_or_torn_is_none(tmp_path: Path) -> None:
    report = tmp_path / "exit.json"
    assert read_ending(report) is None
    report.write_text('{"code": 75, "cau')
    assert read_ending(report) is None
    report.write_text(json.dumps({"code": 75, "cause": "a signal", "rank": 1}))
    assert read_ending(report) == Ending(75, "a signal")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "01", "9999999999", "\u0663"])
def test_a_count_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TRIES", text)
    with pytest.raises(UsageError, match=f"TRIES={text}: it must be a whole number from 1"):
        count_from_environment("TRIES", 3)


def test_an_empty_count_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIES", "")
    assert count_from_environment("TRIES", 3) == 3
    monkeypatch.setenv("TRIES", "7")
    assert count_from_environment("TRIES", 3) == 7
