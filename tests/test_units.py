"""Numbers as people read them."""

import pytest

from distgpt.units import count_text, parse_count, ranks_text, scaled_text, size_text


@pytest.mark.parametrize(
    ("number", "text"),
    [(300, "0.3 KiB"), (12 * 2**20, "12.0 MiB"), (2**30 - 1, "1024.0 MiB"), (1.5 * 2**30, "1.5 GiB")],
)
def test_sizes(number: float, text: str) -> None:
    assert size_text(number) == text


def test_counts() -> None:
    assert [count_text(number) for number in (0.1234, 12.34, 99.9, 12345.6)] == ["0.123", "12.3", "99.9", "12,346"]
    assert [ranks_text(count) for count in (1, 2)] == ["1 rank", "2 ranks"]


def test_large_numbers_are_read_as_they_are_written() -> None:
    assert [scaled_text(number) for number in (845, 844_928, 1.56e9, 3e14)] == ["845", "845K", "1.56B", "300T"]
    assert [scaled_text(number, "flops") for number in (5.68e6, 989.4e12)] == ["5.68 M", "989 T"]
    assert [scaled_text(number, "rate") for number in (950, 5123.0, 999_700)] == ["950", "5.12k", "1,000k"]
    assert [parse_count(text) for text in ("300B", "2.5e9", "10,000", "1.5t")] == [300e9, 2.5e9, 10_000, 1.5e12]
    for text in ("", "many", "-3", "0", "3 apples"):
        with pytest.raises(ValueError, match="is no positive number"):
            parse_count(text)
