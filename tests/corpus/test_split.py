"""The split of documents: near the share asked for, for any number of documents and any hashes."""

import random

import numpy as np
import pytest

from distgpt.corpus.preparing.split import is_near, nearest
from distgpt.errors import DataError


def share(sizes: list[int], fraction: float, seed: int) -> float:
    """Return the share of all tokens that validates, with random hashes."""
    hashes = np.array([random.Random(f"{seed} {i}").getrandbits(64) for i in range(len(sizes))], dtype=np.uint64)
    chosen = np.isin(hashes, nearest(hashes, np.array(sizes), fraction))
    assert 0 < chosen.sum() < len(sizes)
    return float(np.array(sizes)[chosen].sum() / sum(sizes))


@pytest.mark.parametrize("seed", range(8))
def test_few_documents_give_the_nearest_share_whatever_their_hashes(seed: int) -> None:
    assert share([976, 24], 0.1, seed) == 0.024  # train.txt and valid.txt
    assert share([60, 40], 0.4, seed) == 0.4
    assert share([50, 50], 0.1, seed) == 0.5
    assert share([20, 120, 860], 0.1, seed) in (0.12, 0.14)
    assert share([50, 50], 0.9, seed) == 0.5
    assert share([10] * 30, 0.1, seed) == 0.1
    assert share([970] + [1] * 30, 0.1, seed) == 0.03


def test_validation_gets_more_than_half_only_if_asked_for() -> None:
    for seed in range(200):
        source = random.Random(seed)
        sizes = [source.choice([1, 10, 100, 1000]) * source.randrange(1, 20) for _ in range(source.randrange(2, 9))]
        assert share(sizes, source.uniform(0.01, 0.5), seed) <= 0.5


def test_documents_with_the_same_text_stay_together() -> None:
    hashes = np.array([7, 5, 7, 7], dtype=np.uint64)
    assert nearest(hashes, np.array([1, 2, 1, 1]), 0.3).tolist() == [5]
    with pytest.raises(DataError, match="all documents of the input hold the same text"):
        nearest(hashes[[0, 2, 3]], np.array([1, 1, 1]), 0.1)


def test_near_is_within_a_factor_of_two_on_both_sides() -> None:
    assert all(is_near(share, 0.1) for share in (0.05, 0.1, 0.2))
    assert not any(is_near(share, 0.1) for share in (0.0, 0.049, 0.21, 0.976, 1.0))
    assert is_near(0.501, 0.5)
    assert not any(is_near(share, 0.5) for share in (0.2, 0.95))
    assert not is_near(0.51, 0.4)
