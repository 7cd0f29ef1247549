"""Reports of steps: the save interval is chosen early, and shown."""

from pathlib import Path

import pytest
import torch

from distgpt.checkpoint.interval import SaveInterval
from distgpt.config import resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.health.outliers import Decision
from distgpt.health.stragglers import StragglerMonitor
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession
from distgpt.telemetry.progress import Progress
from distgpt.training.figures import Figures
from distgpt.training.step_report import StepReporter
from tests.checkpoint.checkpoints import trainee


def train(directory: Path, dataset: Dataset, *, steps: int, log_every: int) -> SaveInterval:
    """Report some steps of one process, with a save where one is due."""
    directory.mkdir(exist_ok=True)
    subject = trainee(directory, dataset)
    config = resolve(["--train.steps=6", f"--log.every={log_every}", "--checkpoint.every=auto"], {})
    runtime = Runtime(0, 0, 1, 1, torch.device("cpu"))
    plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
    interval = SaveInterval("auto", start_step=0, best_val_loss=None)
    session = RunSession(RunPaths(directory), 0)
    progress = Progress(session, config, plan, start_step=0, peak_tokens_per_second=None)
    stragglers = StragglerMonitor(subject.model, runtime)
    reporter = StepReporter(plan, progress, stragglers, interval, subject.checkpointer, start_step=0)
    with progress:
        for step in range(1, steps + 1):
            stragglers.timer.begin()
            subject.learn()
            reporter.step_done(step, data_wait=0.0)
            reporter.report([(Figures(step, lr=1e-3, loss=2.0, grad_norm=1.0, stop=False), Decision())])
            if interval.is_due(step):
                interval.record_save(step, stalled=0.05)
    return interval


def test_the_save_interval_is_chosen_at_a_log_step_and_shown(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    interval = train(tmp_path, dataset, steps=6, log_every=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("checkpoints every ")]
    assert lines
    assert lines[0].endswith("a save costs 0.05 s of training, a failure is expected every 1d00h")
    assert interval.is_due(10**9)


def test_the_save_interval_is_chosen_early_even_if_steps_are_seldom_logged(dataset: Dataset, tmp_path: Path) -> None:
    assert not train(tmp_path / "a", dataset, steps=1, log_every=10**6).is_due(10**9)
    assert train(tmp_path / "b", dataset, steps=2, log_every=10**6).is_due(10**9)
