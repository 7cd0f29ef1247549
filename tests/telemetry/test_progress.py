"""The progress of one process: goodput.jsonl and the console have the end of an attempt. A full disk ends nothing."""

import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distgpt.config import resolve
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, Interrupted
from distgpt.health.outliers import Decision
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession
from distgpt.telemetry.dashboard import GOODPUT
from distgpt.telemetry.goodput import PARTS, read_goodput
from distgpt.telemetry.metrics import Evaluation
from distgpt.telemetry.progress import Progress
from distgpt.telemetry.step_lines import read_lines

CONFIG = resolve(["--train.steps=6", "--log.every=1"], {})


def progress_in(directory: Path) -> Progress:
    plan = make_plan(CONFIG, Runtime(0, 0, 1, 1, torch.device("cpu")), vocab_size=11)
    session = RunSession(RunPaths(directory), 0)
    return Progress(session, CONFIG, plan, start_step=0, peak_tokens_per_second=60e3)


def train(directory: Path, *, steps: int = 6, error: Exception | None = None) -> None:
    """Report some steps with a save after each, then raise `error`."""
    with progress_in(directory) as progress:
        for step in range(1, steps + 1):
            progress.step_done(step, data_wait=0.0)
            progress.log(step, loss=2.0, lr=1e-3, grad_norm=1.0, decision=Decision())
            with progress.pausing("checkpoint"):
                pass
        if error is not None:
            raise error


@pytest.mark.parametrize(("error", "end"), [(Interrupted("later"), "interrupted"), (DataError("bad"), "failed")])
def test_an_attempt_that_ends_early_records_how_it_ended_and_prints_its_goodput(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, end: str
) -> None:
    with pytest.raises(type(error)):
        train(tmp_path, steps=3, error=error)
    last = read_goodput(tmp_path / "goodput.jsonl")[-1]
    assert (last.end, last.step) == (end, 3)
    assert capsys.readouterr().out.splitlines()[-1].startswith("goodput   ")


def test_a_finished_attempt_prints_its_goodput_and_tensorboard_has_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    assert read_goodput(tmp_path / "goodput.jsonl")[-1].end == "done"
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("goodput   ")
    assert " start " in last_line
    assert " 0.0s" not in last_line, "parts that took no time are left out"
    assert "recovery" not in last_line
    assert [line["mfu"] * 60e3 for line in read_lines(tmp_path / "metrics.jsonl")] == [
        pytest.approx(line["tokens_per_second"]) for line in read_lines(tmp_path / "metrics.jsonl")
    ]
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    names = {f"time/{part}_s" for part in (*PARTS, "repeated", "recovery")} | {GOODPUT}
    assert names <= set(accumulator.Tags()["scalars"])
    assert [event.step for event in accumulator.Scalars(GOODPUT)] == list(range(1, 7))


def test_a_traced_or_slow_step_does_not_change_the_grade_of_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graded: list[float] = []
    plan = make_plan(CONFIG, Runtime(0, 0, 1, 1, torch.device("cpu")), vocab_size=11)
    session = RunSession(RunPaths(tmp_path), 0)
    with Progress(session, CONFIG, plan, start_step=0, peak_tokens_per_second=None, grade=graded.append) as progress:
        seconds = {1: 90.0, 13: 60.0}
        monkeypatch.setattr(progress.goodput, "step", lambda step, data_wait: seconds.get(step, 2.0))
        for step in range(1, 25):
            progress.step_done(step, data_wait=0.0)
    assert graded == [2.0]


def test_an_unwritable_goodput_file_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "goodput.jsonl").mkdir()
    train(tmp_path)
    captured = capsys.readouterr()
    assert captured.err.count("metrics are being lost, training goes on") == 1
    assert "step 6/6 | loss 2.0000" in captured.out
    assert captured.out.splitlines()[-1].startswith("goodput   ")


def test_without_matplotlib_a_line_says_so_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with progress_in(tmp_path) as progress:
        for step in (1, 2):
            progress.step_done(step, data_wait=0.0)
            progress.evaluation(step, Evaluation(2.0, 1.0, standard_error=None), best=True)
    assert capsys.readouterr().out.count("without the package matplotlib: pip install matplotlib") == 1
    assert not (tmp_path / "plots").exists()
