"""A small dataset, and rank 0 of 1."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt.cluster.runtime import Runtime
from distgpt.corpus.shards import Dataset, Documents, open_dataset, write_dataset
from distgpt.corpus.tokenizer import CharTokenizer

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
