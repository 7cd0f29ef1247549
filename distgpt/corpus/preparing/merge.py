"""Merge parts into the two splits of a dataset, in the order of the input.

Of many documents, those whose text hash is below a threshold are validation documents: their share of the tokens is
near the one asked for. Of few documents, or with one that is longer than all others, it may be any share: then
documents are chosen one by one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distgpt.corpus.preparing.copies import Copies, PartReader
from distgpt.corpus.preparing.encode import Unit
from distgpt.corpus.shard_writer import Documents
from distgpt.corpus.shards import SplitName
from distgpt.errors import DataError

Hashes = npt.NDArray[np.uint64]


def merge_parts(
    directory: Path,
    units: Sequence[Unit],
    *,
    documents: int,
    val_fraction: float | None,
    copies: Copies | None = None,
) -> Iterator[Documents]:
    """Yield all tokens in order, with their split, without `copies`; the tokens of each part are read once.

    `val_fraction` is None if the user named the validation text. The validation split of a single document is the last
    `val_fraction` of its tokens. Of several, it is those whose text hash is below that fraction of 2^64, or those that
    `choose_validation` returns. Raises DataError if the text cannot be split.
    """
    reader = PartReader(directory, copies)
    if val_fraction is None:
        return _split_as_named(reader, units)
    merge = _split_at_end if documents == 1 else _split_by_hash
    return merge(reader, len(units), val_fraction)


def is_near(share: float, fraction: float) -> bool:
    """Return True if both splits are within a factor of two of their share. More than half must have been asked for."""
    near = fraction / 2 <= share <= 2 * fraction and 1 - share >= (1 - fraction) / 2
    return near and (share <= 0.5 or fraction >= 0.5)


def choose_validation(hashes: Hashes, sizes: npt.NDArray[np.int64], fraction: float) -> Hashes:
    """Return the text hashes of the validation documents, given the hash and the number of tokens of each document.

    In the order of the hashes, takes each document that still fits `fraction`; then one more, if that brings the share
    nearer to it. Takes at least one but not all, and never more than half of all tokens unless `fraction` is more.
    Raises DataError if all texts are equal.
    """
    texts, index = np.unique(hashes, return_inverse=True)
    if texts.size < 2:
        raise DataError("all documents of the input hold the same text: name other validation text with --val-input")
    tokens = np.bincount(index, weights=sizes)
    room = fraction * tokens.sum()
    limit = max(room, tokens.sum() / 2)
    in_validation = np.zeros(texts.size, dtype=np.bool_)
    for number, size in enumerate(tokens):
        if size <= room:
            in_validation[number] = True
            room -= size
    rest = np.flatnonzero(~in_validation & (tokens[in_validation].sum() + tokens <= limit))
    if rest.size and (~in_validation).sum() > 1:
        best = rest[np.argmin(np.abs(tokens[rest] - room))]
        if abs(tokens[best] - room) < room or not in_validation.any():
            in_validation[best] = True
    return texts[in_validation]


def _split_as_named(reader: PartReader, units: Sequence[Unit]) -> Iterator[Documents]:
    sizes: dict[SplitName, int] = {"train": 0, "val": 0}
    for unit in units:
        table, tokens = reader.part(unit.index)
        name: SplitName = "val" if unit.validates else "train"
        sizes[name] += tokens.size
        yield Documents(name, tokens, np.cumsum(table["size"])[table["ends"]])
    if not sizes["train"]:
        raise DataError("each document of --input is one of --val-input as well: nothing is left to train on")


def _split_at_end(reader: PartReader, count: int, val_fraction: float) -> Iterator[Documents]:
    total = sum(int(reader.table(index)["size"].sum()) for index in range(count))
    if total < 2:
        raise DataError("the input is a single token: too short to train on one part and validate on another")
    left = min(max(int((1 - val_fraction) * total), 1), total - 1)
    name: SplitName
    for index in range(count):
        _, tokens = reader.part(index)
        for name, piece in (("train", tokens[:left]), ("val", tokens[left:])):
            is_end = piece.size == left if name == "train" else index == count - 1
            if piece.size:
                yield Documents(name, piece, np.array([piece.size] if is_end else [], dtype=np.int64))
        left = max(left - tokens.size, 0)


def _split_by_hash(reader: PartReader, count: int, val_fraction: float) -> Iterator[Documents]:
    threshold = int(val_fraction * 2**64)
    total = below = 0
    for index in range(count):
        table = reader.table(index)
        total += int(table["size"].sum())
        below += int(table["size"][table["hash"] < threshold].sum())
    chosen: Hashes | None = None
    if not is_near(below / total, val_fraction):
        # This happens only with few documents, or few that are long: all hashes and sizes fit in memory.
        table = np.concatenate([reader.table(index) for index in range(count)])
        chosen = choose_validation(table["hash"], table["size"], val_fraction)
    name: SplitName
    for index in range(count):
        table, tokens = reader.part(index)
        in_validation = table["hash"] < threshold if chosen is None else np.isin(table["hash"], chosen)
        for name, rows in (("train", ~in_validation), ("val", in_validation)):
            documents = tokens[np.repeat(rows, table["size"])]
            if documents.size:
                yield Documents(name, documents, np.cumsum(table["size"][rows])[table["ends"][rows]])
