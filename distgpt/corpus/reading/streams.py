"""The bytes of a file at any offset, decompressed and in UTF-8 whatever its encoding."""

import codecs
import gzip
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO

from distgpt.corpus.reading.sources import Source
from distgpt.errors import DataError, UsageError

WINDOW_BYTES = 2**16  # searched at a time for a place to cut
CHUNK_BYTES = 2**20
ZSTD_BYTES = 2**10  # decompressed at a time: every four bytes may become 128 KiB
MARK_BAD = "distgpt-bad"  # the name of a codec error handler
BAD_BYTE = b"\xff"  # never occurs in UTF-8
BAD_SURROGATE = "\udcff"  # stands for bad bytes in decoded text, and becomes BAD_BYTE when that is encoded


class SourceBytes:
    """The bytes of an open source, by offset. `end` is their number.

    A file that is compressed or not in UTF-8 can only be read forwards: after `forget(offset)`, bytes before the offset
    must not be read any more. Its `end` is sys.maxsize until `peek` has reached the end.
    """

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self.source = source
        self._file = file
        self._chunks: Iterator[bytes] | None = None
        if source.compression or source.options.encoding:
            self._chunks = _chunks(source, file)
        self._buffer = bytearray()
        self._base = self._needed = 0
        self.end = os.fstat(file.fileno()).st_size if self._chunks is None else sys.maxsize

    @property
    def consumed(self) -> int:
        """The bytes of the file read so far."""
        return self._file.tell()

    def peek(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from the offset on, fewer at the end of the content."""
        if self._chunks is None:
            self._file.seek(offset)
            return self._file.read(size)
        while self._base + len(self._buffer) < min(offset + size, self.end):
            chunk = next(self._chunks, b"")
            self._buffer += chunk
            if not chunk:
                self.end = self._base + len(self._buffer)
            self.forget(self._needed)
        first = offset - self._base
        assert first >= 0, "a compressed source was read backwards"
        return bytes(self._buffer[first : first + size])

    def forget(self, offset: int) -> None:
        """Free the memory for the bytes before the offset."""
        self._needed = offset
        passed = min(max(offset - self._base, 0), len(self._buffer))
        del self._buffer[:passed]
        self._base += passed


def windows(content: SourceBytes, position: int, overlap: int) -> Iterator[tuple[int, bytes]]:
    """Yield windows from `position` on, each with its offset; each begins `overlap` bytes before the last one's end."""
    while window := content.peek(position, WINDOW_BYTES):
        yield position, window
        position += max(len(window) - overlap, 1) if len(window) == WINDOW_BYTES else len(window)


def checked_encoding(name: str) -> str:
    """Return the usual name of an encoding, "" for UTF-8. Raises UsageError if there is no such text encoding."""
    try:
        "".encode(name or "utf-8")
        usual = codecs.lookup(name or "utf-8").name
        # Encodings of host names accept no other error handler, so they cannot be used for text that may be bad.
        codecs.getincrementaldecoder(usual)(MARK_BAD).decode(b"a", final=True)
    except (LookupError, UnicodeError, ValueError):
        raise UsageError(f"--encoding {name}: no such text encoding; for example latin-1, cp1252 or utf-16") from None
    return "" if usual == "utf-8" else usual


def _mark_bad(error: UnicodeError) -> tuple[str | bytes, int]:
    """Decode bad bytes to BAD_SURROGATE; encode that, and any other surrogate, to BAD_BYTE."""
    if isinstance(error, UnicodeDecodeError):
        return BAD_SURROGATE, error.end
    assert isinstance(error, UnicodeEncodeError)
    return BAD_BYTE * (error.end - error.start), error.end


codecs.register_error(MARK_BAD, _mark_bad)


def _chunks(source: Source, file: BinaryIO) -> Iterator[bytes]:
    """Yield the content in UTF-8, with BAD_BYTE for all that is not in the encoding of the source."""
    if source.compression == ".zst":
        chunks = zstd_chunks(source, file)
    else:
        stream = gzip.GzipFile(fileobj=file) if source.compression else file
        chunks = iter(lambda: stream.read(CHUNK_BYTES), b"")
    if not source.options.encoding:
        yield from chunks
        return
    try:
        for text in codecs.iterdecode(chunks, source.options.encoding, MARK_BAD):
            yield text.encode("utf-8", MARK_BAD)
    except UnicodeError:  # utf-16 or utf-32 without a byte order mark: nothing can be decoded
        yield BAD_BYTE


def zstd_chunks(source: Source, file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of Zstandard frames. Raises DataError, also for a missing end, which the package accepts."""
    import zstandard

    frames = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame, is_open, packed = frames.decompressobj(), False, b""
    while packed := packed or file.read(ZSTD_BYTES):
        try:
            plain = frame.decompress(packed)
        except zstandard.ZstdError as error:
            raise DataError(f"{source.name}: damaged or cut short ({error})") from None
        is_open, packed = not frame.eof, frame.unused_data
        if frame.eof:
            frame = frames.decompressobj()
        if plain:
            yield plain
    if is_open:
        raise DataError(f"{source.name}: damaged or cut short (its last frame has no end)")
