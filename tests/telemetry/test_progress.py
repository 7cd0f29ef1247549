"""One process's progress: how an attempt ends is in the ledger and on the console, and a full disk ends nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from distgpt.checkpoint.interval import SaveInterval
from distgpt.config import Config, ModelConfig, resolve
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, Interrupted
from distgpt.health.outliers import Guard
from distgpt.model.gpt import GPT
from distgpt.run.paths import RunPaths
from distgpt.telemetry.goodput import PARTS, read_ledger
from distgpt.telemetry.progress import Progress

CONFIG = resolve(["--train.steps=6", "--log.every=1", "--checkpoint.every=auto"], {})
MODEL = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4)


def progress_in(directory: Path, saves: SaveInterval, config: Config = CONFIG) -> tuple[Progress, GPT]:
    model = GPT(MODEL, 11)
    model.init_weights(0)
    runtime = Runtime(0, 0, 1, 1, torch.device("cpu"))
    made = Progress(
        RunPaths(directory),
        config=config,
        runtime=runtime,
        model=model,
        dtype=torch.float32,
        start_step=0,
        saves=saves,
        require_owned=lambda: None,
    )
    return made, model


def train(directory: Path, *, steps: int = 6, error: Exception | None = None, config: Config = CONFIG) -> SaveInterval:
    """Some steps with a save where one is due, then `error`."""
    saves = SaveInterval("auto", start_step=0, best_val_loss=None)
    progress, model = progress_in(directory, saves, config)
    guard = Guard(CONFIG.health)
    tokens: Tensor = torch.zeros(1, 4, dtype=torch.int64)
    with progress:
        for step in range(1, steps + 1):
            model(tokens, tokens).mean().backward()
            verdict = guard.judge(loss=2.0, grad_norm=1.0)
            progress.step(
                step, loss=2.0, lr=1e-3, grad_norm=1.0, verdict=verdict, data_wait=0.0, saving=False, saved=(0, 0)
            )
            if saves.is_due(step):
                with progress.checkpointing(step):
                    pass
        if error is not None:
            raise error
    return saves


@pytest.mark.parametrize(("error", "end"), [(Interrupted("later"), "interrupted"), (DataError("bad"), "failed")])
def test_an_attempt_that_ends_early_says_how_and_where_the_time_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, end: str
) -> None:
    with pytest.raises(type(error)):
        train(tmp_path, steps=3, error=error)
    last = read_ledger(tmp_path / "goodput.jsonl")[-1]
    assert (last.end, last.step) == (end, 3)
    assert capsys.readouterr().out.splitlines()[-1].startswith("goodput   ")


def test_one_that_is_done_does_too_and_tensorboard_has_all_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path)
    assert read_ledger(tmp_path / "goodput.jsonl")[-1].end == "done"
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("goodput   ")
    for part in (*PARTS, "repeated", "recovery"):
        assert f" {part.replace('_', ' ')} " in said
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    names = {f"goodput/{part}_s" for part in (*PARTS, "repeated", "recovery")} | {"goodput/share"}
    assert names <= set(accumulator.Tags()["scalars"])
    assert [event.step for event in accumulator.Scalars("goodput/share")] == list(range(1, 7))


def test_how_often_to_save_is_decided_at_a_log_step_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = train(tmp_path)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints every ")]
    assert told
    assert told[0].endswith("a save costs 0.05 s of training, a failure is expected every 1d00h")
    assert saves.is_due(10**9)


def test_it_is_decided_soon_however_seldom_is_logged(tmp_path: Path) -> None:
    seldom = replace(CONFIG, log=replace(CONFIG.log, every=10**6))
    assert not train(tmp_path, steps=1, config=seldom).is_due(10**9)
    assert train(tmp_path, steps=2, config=seldom).is_due(10**9)


def test_a_ledger_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "goodput.jsonl").mkdir()
    train(tmp_path)
    captured = capsys.readouterr()
    assert captured.err.count("metrics are being lost, training goes on") == 1
    assert "step 6/6 | loss 2.0000" in captured.out
    assert captured.out.splitlines()[-1].startswith("goodput   ")
