"""Find documents that are exact copies of others, by the text hashes in the tables of the parts.

Of equal documents the first is kept, or the first in the validation text if that was named and holds one. So the result
depends on the input alone. Memory: a byte for each document, and 40 bytes for each of at most PASS_DOCUMENTS hashes,
which are compared at a time. If there are more documents, the tables are read several times.

Two different texts have the same 64-bit hash with a probability of 3% among a billion documents, 3e-8 among a million.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distgpt.corpus.preparing import parts
from distgpt.corpus.preparing.encode import Unit
from distgpt.corpus.preparing.parts import Table
from distgpt.corpus.preparing.scan import Advance
from distgpt.corpus.tokenizer.base import Tokens

PASS_DOCUMENTS = 2**24

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Copies:
    """The documents to leave out: True for each that is a copy. `first`: the number of a part's first document."""

    is_copy: Bools
    first: Mapping[int, int]

    def kept_rows(self, index: int, table: Table) -> Bools:
        """Return True for each row of a part's table that belongs to a document to keep."""
        ends = table["ends"]
        kept: Bools = ~self.is_copy[self.first[index] + np.cumsum(ends) - ends]
        return kept


@dataclass(frozen=True)
class PartReader:
    """Reads parts without the documents to leave out. Raises StorageError if a part is damaged, OSError."""

    directory: Path
    copies: Copies | None = None

    def table(self, index: int) -> Table:
        """Read the table of a part without its tokens."""
        table = parts.read_table(self.directory, index)
        return table if self.copies is None else table[self.copies.kept_rows(index, table)]

    def part(self, index: int) -> tuple[Table, Tokens]:
        """Read the table and the tokens of a part."""
        table, tokens = parts.read_part(self.directory, index)
        if self.copies is None:
            return table, tokens
        rows = self.copies.kept_rows(index, table)
        return table[rows], tokens[np.repeat(rows, table["size"])]


def find_copies(directory: Path, units: Sequence[Unit], *, advance: Advance) -> Copies:
    """Compare all documents; `advance` gets the text bytes of each part. Raises StorageError, OSError."""
    counts = [np.count_nonzero(parts.read_table(directory, unit.index)["ends"]) for unit in units]
    first = {unit.index: int(start) for unit, start in zip(units, np.cumsum([0, *counts]), strict=False)}
    is_copy = np.zeros(sum(counts), dtype=np.bool_)
    passes = -(-is_copy.size // PASS_DOCUMENTS)
    for number in range(passes):
        found: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = []
        for unit in sorted(units, key=lambda unit: not unit.validates):
            table = parts.read_table(directory, unit.index)
            hashes = table["hash"][table["ends"]]
            here = np.flatnonzero(hashes % np.uint64(passes) == number)
            found.append((hashes[here], here + first[unit.index]))
            advance(unit.text_bytes // passes)
        hashes, documents = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        is_copy[documents[order[1:]][hashes[1:] == hashes[:-1]]] = True
    return Copies(is_copy, first)
