"""Part files: the tokens of one unit of the input, behind a table of its documents.

What a part holds depends on the input and the options alone, never on the number of workers. A part is whole and on
disk before it has its name: after a kill, the next run goes on from the parts that are there. The table has a checksum
of its own, so that merging can read the sizes and hashes of all documents first, and each part's tokens only once.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from distgpt.corpus.tokenizer.base import Tokens
from distgpt.errors import StorageError
from distgpt.files import write_file

DIGEST_BYTES = hashlib.sha256().digest_size

# A document, or a piece of one: its number of tokens, whether it ends there, its text hash.
ROW = np.dtype([("size", "<i8"), ("ends", "?"), ("hash", "<u8")])
Row = tuple[int, bool, int]
Table = npt.NDArray[np.void]


def write_part(directory: Path, index: int, documents: Sequence[tuple[Row, Tokens]]) -> None:
    """Write the number of rows, the rows, a SHA-256; then the tokens, a SHA-256. Raises OSError."""
    table = len(documents).to_bytes(8, "little") + np.array([row for row, _ in documents], dtype=ROW).tobytes()
    ids = b"".join(tokens.data for _, tokens in documents)
    content = b"".join((table, hashlib.sha256(table).digest(), ids, hashlib.sha256(ids).digest()))
    write_file(_path(directory, index), content)


def read_table(directory: Path, index: int) -> Table:
    """Read the table of a part without its tokens. Raises StorageError if it is damaged, OSError."""
    with open(_path(directory, index), "rb") as file:
        return _read_table(file)


def read_part(directory: Path, index: int) -> tuple[Table, Tokens]:
    """Read the table and the tokens of a part. Raises StorageError if it is damaged, OSError."""
    with open(_path(directory, index), "rb") as file:
        table, ids = _read_table(file), _verified(file, file.read())
    return table, np.frombuffer(ids, dtype="<u2" if ids.nbytes == 2 * table["size"].sum() else "<u4")


def is_whole(directory: Path, index: int) -> bool:
    """Return True if the part is there and undamaged."""
    try:
        read_part(directory, index)
    except (OSError, StorageError):
        return False
    return True


def remove(directory: Path, index: int) -> None:
    """Remove the part if it is there. Raises OSError."""
    _path(directory, index).unlink(missing_ok=True)


def _path(directory: Path, index: int) -> Path:
    return directory / f"{index:06d}.part"


def _read_table(file: BinaryIO) -> Table:
    count = file.read(8)
    # The number of rows is not verified yet: a damaged one may be huge.
    size = min(int.from_bytes(count, "little") * ROW.itemsize + DIGEST_BYTES, os.fstat(file.fileno()).st_size)
    return np.frombuffer(_verified(file, count + file.read(size)), dtype=ROW, offset=8)


def _verified(file: BinaryIO, content: bytes) -> memoryview:
    """Return the content without the SHA-256 at its end. Raises StorageError if the hash does not match."""
    view = memoryview(content)
    body, digest = view[:-DIGEST_BYTES], view[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise StorageError(f"{file.name} is damaged: run the same command again, which makes this part anew")
    return body
