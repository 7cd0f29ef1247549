"""Answers for slurm/train.sh: flags of an array task, the plan of a run, how an attempt ended."""

import json
from pathlib import Path

import pytest

from distgpt.errors import DataError, UsageError
from distgpt.launch.slurm import flags_of_task, main


def test_a_task_has_the_flags_of_its_line_in_quotes_and_from_any_editor(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.write_bytes(b"\xef\xbb\xbf--optim.lr=1e-3\r\n--run.dir='runs/two words' --optim.lr=2e-3\r\n")
    assert flags_of_task(sweep, 0) == ["--optim.lr=1e-3"]
    assert flags_of_task(sweep, 1) == ["--run.dir=runs/two words", "--optim.lr=2e-3"]
    with pytest.raises(UsageError, match=r"no flags in line 3, that of task 2 \(from 0\)$"):
        flags_of_task(sweep, 2)
    sweep.write_text("--run.dir='never closed\n")
    with pytest.raises(UsageError, match="No closing quotation in line 1"):
        flags_of_task(sweep, 0)


def test_the_plan_is_that_of_a_run_that_can_start(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"--data.path={prepared}", "--run.dir=runs/two words", "--train.steps=7"]) == 0
    assert capsys.readouterr().out == "7 runs/two words\n"
    with pytest.raises(UsageError, match="unknown key"):
        main(["plan", "--train.step=7"])
    with pytest.raises(DataError):
        main(["plan", "--data.path=/nowhere"])


def test_an_ending_is_a_code_a_step_and_a_cause_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "exit.json"
    report.write_text(json.dumps({"code": 75, "step": None, "cause": "two\nlines"}))
    assert main(["ending", str(report)]) == 0
    assert capsys.readouterr().out == "75 0 two lines\n"
