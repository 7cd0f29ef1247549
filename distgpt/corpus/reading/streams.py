"""The bytes of a file at any offset, decompressed and in UTF-8 whatever its encoding."""

import codecs
import gzip
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from distgpt.corpus.reading import sizes
from distgpt.corpus.reading.source import Source
from distgpt.errors import DataError, UsageError

MARK_BAD = "distgpt-bad"  # the name of a codec error handler
HALF_FOR_BAD = "\udcff"


class SourceBytes:
    """The bytes of an open source at offsets. `end` is their number, or None until `peek` has come to it.

    A file that is compressed or not in UTF-8 can only be read forwards: after `forget(offset)`, bytes before the offset
    must not be read any more.
    """

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self._file = file
        self._stream: Any = None
        if source.compression:
            self._stream = gzip.GzipFile(fileobj=file) if source.compression == ".gz" else ZstdStream(source, file)
        if source.options.encoding:
            self._stream = _Recoded(self._stream or file, source.options.encoding)
        self._buffer = bytearray()
        self._base = self._needed = 0
        self.end = os.fstat(file.fileno()).st_size if self._stream is None else None

    @property
    def consumed(self) -> int:
        """The bytes of the file read so far."""
        return self._file.tell()

    def peek(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from the offset on, fewer at the end of the content."""
        if self._stream is None:
            self._file.seek(offset)
            return self._file.read(size)
        while self.end is None and self._base + len(self._buffer) < offset + size:
            chunk = self._stream.read(2**20)
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
    """Yield a window at a time from `position` on, with their offset; each begins `overlap` before the last ends."""
    while window := content.peek(position, sizes.WINDOW_BYTES):
        yield position, window
        position += max(len(window) - overlap, 1) if len(window) == sizes.WINDOW_BYTES else len(window)


def checked_encoding(name: str) -> str:
    """Return the usual name of an encoding, "" for UTF-8. Raises UsageError if there is no such encoding of text."""
    try:
        "".encode(name or "utf-8")
        usual = codecs.lookup(name or "utf-8").name
        # Encodings of host names take no other error handler: they are not for text that may be bad.
        codecs.getincrementaldecoder(usual)(MARK_BAD).decode(b"a", final=True)
    except (LookupError, UnicodeError, ValueError):
        raise UsageError(f"--encoding {name}: no such encoding of text, as latin-1, cp1252 or utf-16") from None
    return "" if usual == "utf-8" else usual


def _mark_bad(error: UnicodeError) -> tuple[str | bytes, int]:
    """Put a byte 0xFF, which UTF-8 does not have, for bytes that cannot be decoded and for half a character."""
    if isinstance(error, UnicodeDecodeError):
        return HALF_FOR_BAD, error.end
    assert isinstance(error, UnicodeEncodeError)
    return b"\xff" * (error.end - error.start), error.end


codecs.register_error(MARK_BAD, _mark_bad)


class _Recoded(io.RawIOBase):
    """A stream of another encoding as UTF-8, with a byte 0xFF for all that is not in that encoding."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(MARK_BAD)
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, more or fewer than `size` but never many; none at the end."""
        while not self._ended:
            raw = self._stream.read(size)
            self._ended = not raw
            try:
                text = self._decoder.decode(raw, final=self._ended)
            except UnicodeError:  # without a byte order mark, nothing can be decoded
                text, self._ended = HALF_FOR_BAD, True
            if text:
                return text.encode("utf-8", MARK_BAD)
        return b""


class ZstdStream(io.RawIOBase):
    """Zstandard frames as a stream that, unlike the package's own, notices a missing end."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._context = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._context.decompressobj()
        self._source = source
        self._file = file
        self._started = False
        self._rest = b""

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, more or fewer than `size` but never many; none at the end. Raises DataError."""
        while packed := self._rest or self._file.read(sizes.ZSTD_BYTES):
            try:
                self._started = True
                plain: bytes = self._frame.decompress(packed)
            except self._error as error:
                raise DataError(f"{self._source.name}: damaged or cut short ({error})") from None
            self._rest = b""
            if self._frame.eof:
                self._rest, self._started = self._frame.unused_data, False
                self._frame = self._context.decompressobj()
            if plain:
                return plain
        if self._started:
            raise DataError(f"{self._source.name}: damaged or cut short (its last frame has no end)")
        return b""
