"""Merge parts into the documents of a dataset, in the order of the input, divided into training and validation.

A threshold on the hash of the text divides many documents near the share asked for. Few documents, or one that is
longer than all others, may give any share: then documents are chosen one by one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distgpt.corpus.preparing import parts
from distgpt.corpus.preparing.encode import Unit
from distgpt.corpus.shard_writer import Documents
from distgpt.corpus.shards import SplitName
from distgpt.errors import DataError

Hashes = npt.NDArray[np.uint64]


def merged(
    directory: Path, units: Sequence[Unit], *, documents: int, val_fraction: float | None
) -> Iterator[Documents]:
    """Yield all tokens in order; the tokens of each part are read once.

    `val_fraction` is None if validation text is named. Of one document, the last `val_fraction` of its tokens validate;
    of several, those whose text hash is below that share of 2^64, or the `nearest`. Raises DataError if nothing can
    validate.
    """
    if val_fraction is None:
        return _merged_as_named(directory, units)
    merge = _merged_tail if documents == 1 else _merged_by_hash
    return merge(directory, len(units), val_fraction)


def is_near(share: float, fraction: float) -> bool:
    """Return True if both splits are within a factor of two of their share, and validation does not get the most."""
    near = fraction / 2 <= share <= 2 * fraction and 1 - share >= (1 - fraction) / 2
    return near and (share <= 0.5 or fraction >= 0.5)


def nearest(hashes: Hashes, sizes: npt.NDArray[np.int64], fraction: float) -> Hashes:
    """Return the text hashes of the documents that validate, given those of all and their tokens.

    In the order of the hashes, each document that still fits; then the one that brings the share nearest to `fraction`.
    At least one and not all, and never more than half of all tokens unless `fraction` is more. Raises DataError.
    """
    texts, index = np.unique(hashes, return_inverse=True)
    if texts.size < 2:
        raise DataError("all documents of the input hold the same text: name other validation text with --val-input")
    tokens = np.bincount(index, weights=sizes)
    room = fraction * tokens.sum()
    limit = max(room, tokens.sum() / 2)
    validates = np.zeros(texts.size, dtype=np.bool_)
    for number, size in enumerate(tokens):
        if size <= room:
            validates[number] = True
            room -= size
    rest = np.flatnonzero(~validates & (tokens[validates].sum() + tokens <= limit))
    if rest.size and (~validates).sum() > 1:
        best = rest[np.argmin(np.abs(tokens[rest] - room))]
        if abs(tokens[best] - room) < room or not validates.any():
            validates[best] = True
    return texts[validates]


def _merged_as_named(directory: Path, units: Sequence[Unit]) -> Iterator[Documents]:
    for unit in units:
        table, tokens = parts.read_part(directory, unit.index)
        name: SplitName = "val" if unit.pieces[0].piece.source.validates else "train"
        yield Documents(name, tokens, np.cumsum(table["size"])[table["ends"]])


def _merged_tail(directory: Path, count: int, val_fraction: float) -> Iterator[Documents]:
    total = sum(int(parts.read_table(directory, index)["size"].sum()) for index in range(count))
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


def _merged_by_hash(directory: Path, count: int, val_fraction: float) -> Iterator[Documents]:
    threshold = int(val_fraction * 2**64)
    total = below = 0
    for index in range(count):
        table = parts.read_table(directory, index)
        total += int(table["size"].sum())
        below += int(table["size"][table["hash"] < threshold].sum())
    chosen: Hashes | None = None
    if not is_near(below / total, val_fraction):
        # Only few documents, or few long ones among others, are so far from it: their hashes and sizes fit in memory.
        table = np.concatenate([parts.read_table(directory, index) for index in range(count)])
        chosen = nearest(table["hash"], table["size"], val_fraction)
    name: SplitName
    for index in range(count):
        table, tokens = parts.read_part(directory, index)
        validates = table["hash"] < threshold if chosen is None else np.isin(table["hash"], chosen)
        for name, rows in (("train", ~validates), ("val", validates)):
            documents = tokens[np.repeat(rows, table["size"])]
            if documents.size:
                yield Documents(name, documents, np.cumsum(table["size"][rows])[table["ends"][rows]])
