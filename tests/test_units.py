"""Numbers as people read them."""

import pytest

from distgpt.units import count_text, ranks_text, size_text


@pytest.mark.parametrize(
    ("number", "text"),
    [(300, "0.3 KiB"), (12 * 2**20, "12.0 MiB"), (2**30 - 1, "1024.0 MiB"), (1.5 * 2**30, "1.5 GiB")],
)
def test_sizes(number: float, text: str) -> None:
    assert size_text(number) == text


def test_counts() -> None:
    assert [count_text(number) for number in (0.1234, 12.34, 99.9, 12345.6)] == ["0.123", "12.3", "99.9", "12,346"]
    assert [ranks_text(count) for count in (1, 2)] == ["1 rank", "2 ranks"]
