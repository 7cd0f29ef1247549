"""A small dataset, rank 0 of 1, and a run with checkpoints."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt.cluster.runtime import Runtime
from distgpt.corpus.shards import Dataset, Documents, open_dataset, write_dataset
from distgpt.corpus.tokenizer import CharTokenizer
from tests.cluster.checkpoints import trainee

ALPHABET = "\n abcdefghijklmnopqrstuvwxyzäöü"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Random characters, some of two bytes: 4,000 tokens for training and 1,001 for validation."""
    return make_dataset(tmp_path_factory.mktemp("random"), seed=0)


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same with other text."""
    return make_dataset(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def one_process() -> Runtime:
    return Runtime(0, 0, 1, 1, torch.device("cpu"))


def make_dataset(directory: Path, *, seed: int) -> Dataset:
    tokenizer = CharTokenizer(sorted(ALPHABET), end_of_text=False)
    draw = np.random.default_rng(seed)
    write_dataset(
        directory,
        [
            Documents("train", draw.integers(0, len(ALPHABET), 4000, dtype=np.uint16), np.array([4000])),
            Documents("val", draw.integers(0, len(ALPHABET), 1001, dtype=np.uint16), np.array([1001])),
        ],
        tokenizer=tokenizer,
        eot_id=None,
        shard_tokens=None,
        about={},
        advance=lambda written: None,
    )
    return open_dataset(directory)


@pytest.fixture(scope="session")
def saved(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1 and 2. Copy it before changing it."""
    run = tmp_path_factory.mktemp("saved")
    subject = trainee(run, dataset)
    for step in (1, 2):
        subject.learn()
        subject.checkpointer.save(step, val_loss=3.0 + step)
    subject.checkpointer.require_saved(2)
    assert subject.said == []
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to break."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"
