"""Who is wrong if two ranks disagree. tests/end_to_end/test_exact.py has ranks that are."""

import pytest

from distgpt.config import resolve
from distgpt.errors import UsageError
from distgpt.training.cross_check import wrong_ranks


@pytest.mark.parametrize(
    ("results", "wrong"),
    [
        # The votes of all ranks, then the two results that differed.
        ([(0, 7), (1, 9), (2, 7), (1, 9), (0, 7)], [1]),  # a persistent fault of rank 1
        ([(0, 7), (1, 7), (2, 7), (1, 9), (0, 7)], [1]),  # rank 1 erred once, on its own micro-batch
        ([(0, 7), (1, 7), (2, 7), (1, 7), (0, 9)], [0]),  # rank 0 erred once, on that of rank 1
        ([(0, 7), (1, 7), (1, 9), (0, 7)], [1]),  # of two, one that errs now and then
        ([(0, 7), (1, 9), (1, 9), (0, 7)], [0, 1]),  # of two, one that always errs
        ([(0, 7), (0, 9), (0, 7)], [0]),  # one process, which errs now and then
    ],
)
def test_the_majority_is_right(results: list[tuple[int, int]], wrong: list[int]) -> None:
    assert wrong_ranks(results) == wrong


def test_checks_need_exact_gradients() -> None:
    with pytest.raises(UsageError, match="needs --parallel"):
        resolve(["--health.check_every=10"], {})
