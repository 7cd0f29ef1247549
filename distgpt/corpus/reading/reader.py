"""An open source: the pieces that it is cut into, and the content of each."""

import codecs
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from distgpt.corpus.reading import json_text, sizes, text
from distgpt.corpus.reading.parquet import ParquetReader
from distgpt.corpus.reading.source import Content, Piece, Source, content_of
from distgpt.corpus.reading.streams import SourceBytes
from distgpt.errors import DataError


class Reader(Protocol):
    """An open source. A source that is not seekable can only be read forwards."""

    @property
    def consumed(self) -> int: ...  # bytes of the file read so far, for progress
    def pieces(self) -> Iterator[Piece]: ...
    def content(self, piece: Piece) -> Content: ...


@contextmanager
def open_source(source: Source) -> Iterator[Reader]:
    """Open a source. Raises DataError for content that is damaged or not text, OSError if it cannot be read."""
    try:
        with open(source.path, "rb") as file:
            if source.format == "parquet":
                yield ParquetReader(source, file)
            else:
                yield _TextReader(source, SourceBytes(source, file))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source.name}: damaged or cut short ({error})") from None


class _TextReader:
    """A source of text or JSON."""

    def __init__(self, source: Source, content: SourceBytes) -> None:
        self._source = source
        self._content = content

    @property
    def consumed(self) -> int:
        return self._content.consumed

    def pieces(self) -> Iterator[Piece]:
        # A byte order mark alone is an empty text.
        start, last = 0, self._content.peek(0, 4) in (b"", codecs.BOM_UTF8)
        while not last:
            stop = self._cut(start)
            last = not self._content.peek(stop, 1)
            yield Piece(self._source, start, stop, last)
            start = stop

    def content(self, piece: Piece) -> Content:
        source = self._source
        self._content.forget(piece.start)
        raw, start = self._content.peek(piece.start, piece.stop - piece.start), piece.start
        if start == 0 and raw.startswith(codecs.BOM_UTF8):  # it marks the encoding and is not part of the text
            raw, start = raw.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        digest = hashlib.sha256(f"{source.format}\n{source.text_key}\n".encode() + raw).digest()
        if piece.start == 0 and (utf16 := text.utf16_name(raw)):
            reason = f"is UTF-16, not UTF-8: use --encoding {utf16} if all of the input is"
            return content_of(source, [("", reason)], digest)
        if source.format in ("json", "jsonl"):
            is_lines = source.format == "jsonl"
            found = raw.removesuffix(b"\n").split(b"\n") if is_lines else json_text.split_objects(raw)
            return content_of(source, (json_text.text_of(source.text_key, entry) for entry in found), digest)
        if source.format == "separated":
            parts, separators = text.split_at_separators(source, raw)
            return content_of(source, (text.decode(source, part) for part in parts), digest, separators)
        return content_of(source, [text.decode(source, raw, start)], digest, text.count_separator_lines(raw))

    def _cut(self, start: int) -> int:
        """Return the end of the piece that begins at `start`."""
        target = start + sizes.UNIT_BYTES
        if self._source.format == "json":
            return json_text.cut_objects(self._content, start)
        if self._source.format == "jsonl":
            return json_text.cut_lines(self._content, target)
        if self._source.format == "separated":
            return text.cut_separated(self._source, self._content, target)
        return text.cut_text(self._content, target)
