"""A run with checkpoints."""

import shutil
from pathlib import Path

import pytest

from distgpt.corpus.shards import Dataset
from tests.checkpoint.checkpoints import trainee


@pytest.fixture(scope="session")
def saved(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1 and 2. Copy it before changing it."""
    run = tmp_path_factory.mktemp("saved")
    subject = trainee(run, dataset)
    for step in (1, 2):
        subject.learn()
        subject.checkpointer.save(step, val_loss=3.0 + step)
    subject.checkpointer.require_saved(2)
    assert subject.messages == []
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to break."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"
