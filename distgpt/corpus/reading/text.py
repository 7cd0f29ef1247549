"""Plain text: where it can be cut, its documents, and what makes one bad."""

import codecs
import re
from functools import lru_cache

from distgpt.corpus.reading import sizes
from distgpt.corpus.reading.source import Checked, Source
from distgpt.corpus.reading.streams import SourceBytes, windows
from distgpt.errors import DataError

CUT_OVERLAP = 16  # of two windows: more than a character on both sides of a cut

# A lone newline or space between two characters that are not whitespace. GPT-2's pattern always starts a new word at
# whitespace that follows something else, and looks back at nothing, so both sides encode as they do in one go. Halves
# of characters at the window's ends decode to lone surrogates, which do not count.
_WORD_END = re.compile(r"(?<=[^\s\udc80-\udcff])[\n ](?=[^\s\udc80-\udcff])")
# Lines that other programs write between the documents of a text file.
_SEPARATOR_LINES = re.compile(rb"(?m)^(?:<\|endoftext\|>|<\|end_of_text\|>|</s>)[ \t\r]*$")


def cut_text(content: SourceBytes, target: int) -> int:
    """Return the offset of the first end of a word at or after `target`, or the end of the content."""
    for position, window in windows(content, target, CUT_OVERLAP):
        if position > target + 3 * sizes.UNIT_BYTES:
            # One run without a space, longer than three units: cut between characters, BPE ids may differ there.
            return position + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)
        text = window.decode("utf-8", "surrogateescape")
        if match := _WORD_END.search(text):
            return position + len(text[: match.start()].encode("utf-8", "surrogateescape"))
    assert content.end is not None
    return content.end


def cut_separated(source: Source, content: SourceBytes, target: int) -> int:
    """Return the end of the first separator that ends after `target`, or of the content. Raises DataError."""
    pattern = _separator(source.options.separator)
    overlap = len(source.options.separator.encode()) + 4  # and the line ends around it
    # The separator may be followed by a line end, which belongs to it and must be in the same piece.
    start = max(target - overlap, 0)
    for position, window in windows(content, start, overlap):
        if position > target + sizes.SEPARATED_BYTES:
            raise DataError(
                f"{source.name}: no {source.options.separator!r} in {sizes.SEPARATED_BYTES / 2**30:g} GiB, "
                f"from byte {start:,} on: is it the separator that --document-separator should name?"
            )
        match = pattern.search(window)
        # A separator at the end of a window may go on in the next one, unless the content ends there.
        if match and (match.end() + 2 <= len(window) or len(window) < sizes.WINDOW_BYTES):
            return position + match.end()
    assert content.end is not None
    return content.end


def split_at_separators(source: Source, raw: bytes) -> tuple[list[bytes], int]:
    """Return the documents in a piece of separated text, and the number of separators."""
    parts = _separator(source.options.separator).split(raw)
    return parts if parts[-1] else parts[:-1], len(parts) - 1


def decode(source: Source, raw: bytes, start: int | None = None) -> Checked:
    """Decode a document, with U+FFFD for all that is not UTF-8. `start`: its offset in the file, where that helps."""
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


def utf16_name(raw: bytes) -> str:
    """Return the name of the UTF-16 that a file begins with, by its mark or by the zeros in Latin letters; "": none."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = raw[:1000]
    zeros, name = max((head[0::2].count(0), "utf-16-be"), (head[1::2].count(0), "utf-16-le"))
    return name if zeros > max(len(head) // 4, 1) else ""


def count_separator_lines(raw: bytes) -> int:
    """Return the number of lines that look like separators of documents."""
    return len(_SEPARATOR_LINES.findall(raw)) if b"<|end" in raw or b"</s>" in raw else 0


@lru_cache
def _separator(text: str) -> re.Pattern[bytes]:
    """Return the pattern of a separator with a line end on either side."""
    return re.compile(rb"(?:\r?\n)?" + re.escape(text.encode()) + rb"(?:\r?\n)?")
