"""Parquet: the text in a column, row by row, or why a row has none."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from distgpt.corpus.reading import sources
from distgpt.corpus.reading.sources import CheckedText, Content, Piece, Source, content_of, utf8_size
from distgpt.errors import DataError

BATCH_ROWS = 16
ROW_BYTES = 64  # counted for a row besides its text, so that a piece of empty rows ends too


class ParquetReader:
    """A Parquet source, read forwards."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        import pyarrow
        import pyarrow.parquet

        self._source = source
        self._error = pyarrow.ArrowException
        self._size = os.fstat(file.fileno()).st_size
        with self._damage_as_data_error():
            self._file = pyarrow.parquet.ParquetFile(file)
            schema = self._file.schema_arrow
        self._fields = _fields(schema, source.text_key)
        if not self._fields:
            names = ", ".join(schema.names[:8])
            raise DataError(
                f"{source.name}: no column {source.text_key!r} (there are: {names}); --text-key names the one to read"
            )
        self._rows: int = self._file.metadata.num_rows
        self._row = 0  # the number of the next row to read from the file
        self._texts: Iterator[CheckedText] | None = None
        self._ahead: deque[CheckedText] = deque()  # rows that `pieces` read to find where a piece ends

    @property
    def consumed(self) -> int:
        return self._size * self._row // max(self._rows, 1)

    def pieces(self) -> Iterator[Piece]:
        # Sizes that the file states are those of dictionary-encoded text, and a short file may hold any amount of text.
        self._texts = self._read(0)
        start = size = 0
        for text, reason in self._texts:
            self._ahead.append((text, reason))
            size += utf8_size(text) + ROW_BYTES
            if size >= sources.UNIT_BYTES or self._row == self._rows:
                yield Piece(self._source, start, self._row, self._row == self._rows)
                start, size = self._row, 0

    def content(self, piece: Piece) -> Content:
        if self._texts is None:
            self._row = piece.start
            self._texts = self._read(piece.start)
        assert piece.start == self._row - len(self._ahead), "a Parquet source was not read in order"
        rows = [self._ahead.popleft() if self._ahead else next(self._texts) for _ in range(piece.start, piece.stop)]
        digest = hashlib.sha256(f"parquet\n{self._source.text_key}\n".encode())
        for text, _ in rows:
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return content_of(self._source, rows, digest.digest())

    def _read(self, start: int) -> Iterator[CheckedText]:
        """Yield the text of each row from `start` on."""
        key, metadata = self._source.text_key, self._file.metadata
        skipped = 0  # row groups
        while start and (rows := metadata.row_group(skipped).num_rows) <= start:
            start -= rows
            skipped += 1
        groups = range(skipped, metadata.num_row_groups)
        with self._damage_as_data_error():
            for batch in self._file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[key], use_threads=False):
                for value in batch.column(0)[start:]:
                    self._row += 1
                    yield _text_of(value, self._fields, key)
                start = max(start - len(batch), 0)

    @contextmanager
    def _damage_as_data_error(self) -> Iterator[None]:
        try:
            yield
        except (self._error, OSError) as error:
            raise DataError(f"{self._source.name}: damaged or not Parquet ({str(error).splitlines()[0]})") from None


def _fields(schema: Any, key: str) -> list[str]:
    """Return the column of this key and, for a key with dots, the nested fields; nothing if there is no such column."""
    if key in schema.names:
        return [key]
    names, fields = key.split("."), {field.name: field.type for field in schema}
    for name in names[:-1]:
        kind = fields.get(name)
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if kind is not None else {}
    return names if names[-1] in fields else []


def _text_of(value: Any, fields: Sequence[str], key: str) -> CheckedText:
    """Return the text in the value of a row."""
    for name in fields[1:]:
        value = value[name] if value.is_valid else value
    value = getattr(value, "value", value)  # a dictionary-encoded entry stands for its value
    content = value.as_buffer().to_pybytes() if value.is_valid and hasattr(value, "as_buffer") else value.as_py()
    if not isinstance(content, bytes):
        return "", f"{key!r} is not a string but {type(content).__name__}"
    try:
        return content.decode(), ""
    except UnicodeDecodeError as error:
        return content.decode(errors="replace"), f"not UTF-8, byte {error.start:,} of the text ({error.reason})"
