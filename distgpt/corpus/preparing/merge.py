"""Merge parts into the documents of a dataset, in the order of the input, divided into training and validation."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distgpt.corpus.preparing import parts, split
from distgpt.corpus.preparing.encode import Unit
from distgpt.corpus.shard_writer import Documents
from distgpt.corpus.shards import SplitName
from distgpt.errors import DataError


def merged(
    directory: Path, units: Sequence[Unit], *, documents: int, val_fraction: float | None
) -> Iterator[Documents]:
    """Yield all tokens in order; the tokens of each part are read once.

    `val_fraction` is None if validation text is named. Of one document, the last `val_fraction` of its tokens validate;
    of several, those whose text hash is below that share of 2^64, or those that `split.nearest` chooses. Raises
    DataError if nothing can validate.
    """
    if val_fraction is None:
        return _merged_as_named(directory, units)
    if documents == 1:
        return _merged_tail(directory, len(units), val_fraction)
    return _merged_by_hash(directory, len(units), _chooser(directory, len(units), val_fraction))


def _merged_as_named(directory: Path, units: Sequence[Unit]) -> Iterator[Documents]:
    for unit in units:
        table, tokens = parts.read_part(directory, unit.index)
        name: SplitName = "val" if unit.pieces[0].piece.source.validates else "train"
        yield Documents(name, tokens, np.cumsum(table.sizes)[table.ends])


def _merged_tail(directory: Path, count: int, val_fraction: float) -> Iterator[Documents]:
    total = sum(int(parts.read_table(directory, index).sizes.sum()) for index in range(count))
    if total < 2:
        raise DataError("the input is a single token: too short to train on one part and validate on another")
    left = min(max(int((1 - val_fraction) * total), 1), total - 1)
    name: SplitName
    for index in range(count):
        _, tokens = parts.read_part(directory, index)
        for name, piece in (("train", tokens[:left]), ("val", tokens[left:])):
            is_end = piece.size == left if name == "train" else index == count - 1
            if piece.size:
                yield Documents(name, piece, np.array([piece.size] if is_end else [], dtype=np.int64))
        left = max(left - tokens.size, 0)


def _merged_by_hash(
    directory: Path, count: int, validating: Callable[[split.Hashes], npt.NDArray[np.bool_]]
) -> Iterator[Documents]:
    name: SplitName
    for index in range(count):
        table, tokens = parts.read_part(directory, index)
        validates = validating(table.hashes)
        for name, rows in (("train", ~validates), ("val", validates)):
            chosen = tokens[np.repeat(rows, table.sizes)]
            if chosen.size:
                yield Documents(name, chosen, np.cumsum(table.sizes[rows])[table.ends[rows]])


def _chooser(directory: Path, count: int, val_fraction: float) -> Callable[[split.Hashes], npt.NDArray[np.bool_]]:
    """Return a function that tells which text hashes are of documents that validate."""
    threshold = split.threshold(val_fraction)
    total = validating = 0
    for index in range(count):
        table = parts.read_table(directory, index)
        total += int(table.sizes.sum())
        validating += int(table.sizes[table.hashes < threshold].sum())
    if split.is_near(validating / total, val_fraction):
        return lambda hashes: hashes < threshold
    # Only few documents, or few long ones among others, are so far from it: their hashes and sizes fit in memory.
    tables = [parts.read_table(directory, index) for index in range(count)]
    hashes, sizes = (np.concatenate([getattr(table, name) for table in tables]) for name in ("hashes", "sizes"))
    nearest = split.nearest(hashes, sizes, val_fraction)
    return lambda hashes: np.isin(hashes, nearest)
