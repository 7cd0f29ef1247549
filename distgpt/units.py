"""Numbers as people read them. Imports no torch."""

import math
import re
from typing import Literal

LETTERS = {"count": "KMBT", "flops": "KMGTPEZY", "rate": "kMGT"}
SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size_text(number: float) -> str:
    """Return a number of bytes in its largest unit: 1.5 GiB, 12.0 MiB, 0.3 KiB."""
    unit, size = next((unit for unit in SIZES if number >= unit[1]), SIZES[-1])
    return f"{number / size:.1f} {unit}"


def ranks_text(count: int) -> str:
    """Return a number of ranks: 1 rank, 2 ranks."""
    return f"{count} rank{'s' * (count > 1)}"


def duration(seconds: float) -> str:
    """Format seconds: 45s, 3m12s, 2h05m or 3d04h; ? if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{smaller_unit}"
    return f"{whole}s"


def count_text(number: float) -> str:
    """Return a number with three digits if it is below 100, else as a whole one: 0.123, 12.3, 12,345."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def scaled_text(number: float, kind: Literal["count", "flops", "rate"] = "count") -> str:
    """Return a number with three digits: 1.56B tokens; as a rate 4.29k; of FLOPs with the letter as prefix, 9.98 G."""
    letters = LETTERS[kind]
    power = min(len(letters), max(0, int(math.log10(number)) // 3)) if number >= 1 else 0
    return f"{count_text(number / 1000**power)}{' ' * (kind == 'flops')}{letters[power - 1] if power else ''}"


def parse_count(text: str) -> float:
    """Return the number in a text like 300B, 2.5e9 or 10,000. Raises ValueError if it is none, or not positive."""
    letters = LETTERS["count"]
    found = re.fullmatch(rf"([\d.,]+(?:e\+?\d+)?)([{letters}]?)", text.strip(), re.IGNORECASE)
    if found is None or not (number := float(found[1].replace(",", ""))) > 0:
        raise ValueError(f"{text!r} is no positive number")
    return number * 1000.0 ** (letters.index(found[2].upper()) + 1 if found[2] else 0)
