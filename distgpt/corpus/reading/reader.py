"""An open source: the pieces that it is cut into, and the content of each."""

import codecs
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from distgpt.corpus.reading import json_text, sources, streams
from distgpt.corpus.reading.parquet import ParquetReader
from distgpt.corpus.reading.sources import CheckedText, Content, Piece, Source, content_of
from distgpt.corpus.reading.streams import SourceBytes, windows
from distgpt.errors import DataError

CUT_OVERLAP = 16  # of consecutive windows: more than a character on both sides of a cut
SEPARATED_BYTES = 2**30  # the longest document before a separator: it is in memory as a whole

# A lone newline or space between two characters that are not whitespace. GPT-2's pattern always starts a new word at
# whitespace that follows something else, and has no look-behind, so the two sides encode as they do together. A
# character that is cut by a window's end decodes to lone surrogates, which do not match.
_WORD_END = re.compile(r"(?<=[^\s\udc80-\udcff])[\n ](?=[^\s\udc80-\udcff])")
# Lines that other programs write between the documents of a text file.
_SEPARATOR_LINES = re.compile(rb"(?m)^(?:<\|endoftext\|>|<\|end_of_text\|>|</s>)[ \t\r]*$")


class TextReader(SourceBytes):
    """A source of text or JSON."""

    def pieces(self) -> Iterator[Piece]:
        # A byte order mark alone is an empty text.
        start, last = 0, self.peek(0, 4) in (b"", codecs.BOM_UTF8)
        while not last:
            stop = self._cut(start)
            last = not self.peek(stop, 1)
            yield Piece(self.source, start, stop, last)
            start = stop

    def content(self, piece: Piece) -> Content:
        source, start = self.source, piece.start
        self.forget(start)
        raw = self.peek(start, piece.stop - start)
        if start == 0 and raw.startswith(codecs.BOM_UTF8):  # it marks the encoding and is not part of the text
            raw, start = raw.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        digest = hashlib.sha256(f"{source.format}\n{source.text_key}\n".encode() + raw).digest()
        if piece.start == 0 and (utf16 := _utf16_name(raw)):
            reason = f"is UTF-16, not UTF-8: use --encoding {utf16} if all of the input is"
            return content_of(source, [("", reason)], digest)
        if source.format in ("json", "jsonl"):
            found = json_text.split_lines(raw) if source.format == "jsonl" else json_text.split_objects(raw)
            return content_of(source, (json_text.text_of(source.text_key, entry) for entry in found), digest)
        if source.format == "separated":
            parts = self._separator.split(raw)
            documents = parts if parts[-1] else parts[:-1]
            return content_of(source, (_decode(source, part) for part in documents), digest, len(parts) - 1)
        separators = len(_SEPARATOR_LINES.findall(raw)) if b"<|end" in raw or b"</s>" in raw else 0
        return content_of(source, [_decode(source, raw, start)], digest, separators)

    def _cut(self, start: int) -> int:
        """Return the end of the piece that begins at `start`."""
        target = start + sources.UNIT_BYTES
        if self.source.format == "json":
            return json_text.cut_objects(self, start)
        if self.source.format == "jsonl":
            return json_text.cut_lines(self, target)
        return self._cut_separated(target) if self.source.format == "separated" else self._cut_text(target)

    def _cut_text(self, target: int) -> int:
        """Return the offset of the first end of a word at or after `target`, or the end of the content."""
        for position, window in windows(self, target, CUT_OVERLAP):
            if position > target + 3 * sources.UNIT_BYTES:
                # No space in three units: cut between two characters, although BPE ids may then differ.
                return position + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
            text = window.decode("utf-8", "surrogateescape")
            if match := _WORD_END.search(text):
                return position + len(text[: match.start()].encode("utf-8", "surrogateescape"))
        return self.end

    def _cut_separated(self, target: int) -> int:
        """Return the end of the first separator that ends after `target`, or of the content. Raises DataError."""
        separator = self.source.options.separator
        overlap = len(separator.encode()) + 4  # the line ends around it
        # The separator may be followed by a line end, which belongs to it and must be in the same piece.
        start = max(target - overlap, 0)
        for position, window in windows(self, start, overlap):
            if position > target + SEPARATED_BYTES:
                raise DataError(
                    f"{self.source.name}: no {separator!r} in {SEPARATED_BYTES / 2**30:g} GiB, from byte {start:,} on: "
                    "is it the separator that --document-separator should name?"
                )
            match = self._separator.search(window)
            # A separator at the end of a window may go on in the next one, unless the content ends there.
            if match and (match.end() + 2 <= len(window) or len(window) < streams.WINDOW_BYTES):
                return position + match.end()
        return self.end

    @property
    def _separator(self) -> re.Pattern[bytes]:
        """The separator between documents, with a line end on either side."""
        return re.compile(rb"(?:\r?\n)?" + re.escape(self.source.options.separator.encode()) + rb"(?:\r?\n)?")


@contextmanager
def open_source(source: Source) -> Iterator[TextReader | ParquetReader]:
    """Open a source. One that is not seekable can only be read forwards.

    Raises DataError for content that is damaged or not text, OSError if it cannot be read.
    """
    try:
        with open(source.path, "rb") as file:
            yield ParquetReader(source, file) if source.format == "parquet" else TextReader(source, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source.name}: damaged or cut short ({error})") from None


def _decode(source: Source, raw: bytes, start: int | None = None) -> CheckedText:
    """Decode a document, with U+FFFD for all that is not UTF-8. `start`: its offset in the file, for the message."""
    try:
        return raw.decode(), ""
    except UnicodeDecodeError as error:
        at, reason = error.start, error.reason
    text, encoding = raw.decode(errors="replace"), source.options.encoding
    if encoding in ("utf-16", "utf-32"):
        return text, f"is not {encoding} (without a byte order mark: {encoding}-le or {encoding}-be)"
    if encoding:
        return text, f"is not {encoding}"
    if start is None:
        return text, f"not UTF-8, byte {at:,} of the document ({reason})"
    inside = " of its decompressed content" if source.compression else ""
    return text, f"is not UTF-8: byte {start + at:,}{inside} ({reason}); --encoding names another"


def _utf16_name(raw: bytes) -> str:
    """Return the UTF-16 encoding that a file seems to have, by its mark or its zero bytes; "" if none."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = raw[:1000]
    zeros, name = max((head[0::2].count(0), "utf-16-be"), (head[1::2].count(0), "utf-16-le"))
    return name if zeros > max(len(head) // 4, 1) else ""
