"""An input file, and the pieces that it is cut into.

A text file is one document, or several with a separator between them. Each JSON object and each row of Parquet is a
document. A worker holds one piece in memory at a time, so a long text file is several pieces.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

UNIT_BYTES = 8 * 2**20  # of text in a piece, about

Format = Literal["text", "separated", "jsonl", "json", "parquet"]
Compression = Literal["", ".gz", ".zst"]
OnBad = Literal["stop", "skip", "replace"]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The options for all files of an input. An empty `encoding` is UTF-8, an empty `separator` means there is none."""

    text_key: str = "text"
    separator: str = ""
    encoding: str = ""
    on_bad: OnBad = "stop"


@dataclass(frozen=True, slots=True)
class Source:
    """One input file. `path` is empty for standard input and URLs, which are not here yet. `name` is for messages.

    "separated" is text with a separator between documents; "json" is an array, or objects over several lines.
    `validates`: the text goes to the validation split.
    """

    path: str
    name: str
    format: Format
    compression: Compression = ""
    options: ReadOptions = ReadOptions()
    validates: bool = False

    @property
    def is_seekable(self) -> bool:
        """True if a piece can be read without reading those before it."""
        return self.format not in ("json", "parquet") and not self.compression and not self.options.encoding

    @property
    def text_key(self) -> str:
        """The key of the text in a document; "" where documents have no keys."""
        return self.options.text_key if self.format in ("json", "jsonl", "parquet") else ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a source: bytes of its decompressed content, or rows of Parquet. `last`: of its source."""

    source: Source
    start: int
    stop: int
    last: bool


class BadDocument(NamedTuple):
    """A document that cannot be read in full: its number in the piece, from 0, and the reason."""

    number: int
    reason: str
    replaced: bool

    def place(self, source: Source, before: int) -> str:
        """Return its place and the reason; `before`: the number of lines, rows or documents in earlier pieces."""
        if source.format == "text":
            return f"{source.name} {self.reason}"
        word = {"jsonl": "line", "json": "object", "parquet": "row", "separated": "document"}[source.format]
        return f"{source.name}, {word} {before + self.number + 1:,}: {self.reason}"


class Content(NamedTuple):
    """The content of a piece: the text of its documents (for a text file: a part of the only one) and its SHA-256.

    The option `on_bad` decides: a bad document is an empty text, or has U+FFFD for each bad character. `separators`
    counts the separators or, if no separator was given, lines that look like one.
    """

    texts: list[str]
    digest: bytes
    bad: list[BadDocument]
    separators: int


# The text of a document, and the reason why it is bad: "" for a good one.
CheckedText = tuple[str, str]


def content_of(source: Source, documents: Iterable[CheckedText], digest: bytes, separators: int = 0) -> Content:
    """Make the content of a piece from its documents, and treat bad ones as `on_bad` says."""
    texts, bad = [], []
    for number, (text, reason) in enumerate(documents):
        if reason:
            text = text if source.options.on_bad == "replace" else ""
            bad.append(BadDocument(number, reason, replaced=text != ""))
        texts.append(text)
    return Content(texts, digest, bad, separators)


def utf8_size(text: str) -> int:
    """Return the number of bytes that `text` has in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
