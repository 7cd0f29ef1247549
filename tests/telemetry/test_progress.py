"""The progress of one process: the end of an attempt is in the ledger and on the console; a full disk ends nothing."""

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
from distgpt.telemetry.goodput import PARTS, read_ledger
from distgpt.telemetry.progress import Progress

CONFIG = resolve(["--train.steps=6", "--log.every=1"], {})


def progress_in(directory: Path) -> Progress:
    runtime = Runtime(0, 0, 1, 1, torch.device("cpu"))
    return Progress(
        RunPaths(directory),
        config=CONFIG,
        plan=make_plan(CONFIG, runtime, vocab_size=11),
        flops_per_token=1e6,
        peak_flops=None,
        start_step=0,
        require_owned=lambda: None,
    )


def train(directory: Path, *, steps: int = 6, error: Exception | None = None) -> None:
    """Show some steps with a save after each, then raise `error`."""
    with progress_in(directory) as progress:
        for step in range(1, steps + 1):
            progress.step_done(step, data_wait=0.0)
            progress.log(step, loss=2.0, lr=1e-3, grad_norm=1.0, decision=Decision())
            with progress.checkpointing():
                pass
        if error is not None:
            raise error


@pytest.mark.parametrize(("error", "end"), [(Interrupted("later"), "interrupted"), (DataError("bad"), "failed")])
def test_an_attempt_that_ends_early_says_how_and_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, end: str
) -> None:
    with pytest.raises(type(error)):
        train(tmp_path, steps=3, error=error)
    last = read_ledger(tmp_path / "goodput.jsonl")[-1]
    assert (last.end, last.step) == (end, 3)
    assert capsys.readouterr().out.splitlines()[-1].startswith("goodput   ")


def test_a_finished_attempt_does_too_and_tensorboard_has_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    assert read_ledger(tmp_path / "goodput.jsonl")[-1].end == "done"
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("goodput   ")
    for part in (*PARTS, "repeated", "recovery"):
        assert f" {part.replace('_', ' ')} " in last_line
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    names = {f"goodput/{part}_s" for part in (*PARTS, "repeated", "recovery")} | {"goodput/share"}
    assert names <= set(accumulator.Tags()["scalars"])
    assert [event.step for event in accumulator.Scalars("goodput/share")] == list(range(1, 7))


def test_an_unwritable_ledger_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "goodput.jsonl").mkdir()
    train(tmp_path)
    captured = capsys.readouterr()
    assert captured.err.count("metrics are being lost, training goes on") == 1
    assert "step 6/6 | loss 2.0000" in captured.out
    assert captured.out.splitlines()[-1].startswith("goodput   ")
