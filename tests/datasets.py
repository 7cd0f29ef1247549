"""A small dataset of random characters."""

from pathlib import Path

import numpy as np

from distgpt.corpus.shard_writer import Documents, write_dataset
from distgpt.corpus.shards import Dataset, open_dataset
from distgpt.corpus.tokenizer.simple import CharTokenizer

ALPHABET = "\n abcdefghijklmnopqrstuvwxyzäöü"


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
