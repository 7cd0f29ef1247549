"""Files, folders, JSON, Parquet, .gz and .zst as documents, in pieces of bounded size.

A text file is one document, or several with a separator between them; an object of JSON or a row of Parquet is one
document each. A source is cut into pieces of about UNIT_BYTES of text: what one worker holds in memory at a time. A
text file longer than that continues over several pieces.
"""

import codecs
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shlex
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import orjson

from distgpt.errors import DataError, UsageError

UNIT_BYTES = 8 * 2**20
WINDOW_BYTES = 2**16
PARQUET_BATCH = 16
PARQUET_ROW_BYTES = 64  # what a row takes in memory besides its text, so that a piece of empty ones ends too
ZSTD_BYTES = 2**10  # each four of which may hold 128 KiB
HEAD_BYTES = 2**16  # of a file, to see whether it is JSON
SEPARATED_BYTES = 2**30  # the longest document before a separator, all of which is in memory at a time

STDIN = "-"
MARK_BAD = "distgpt-bad"  # the name of a codec error handler
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".java", ".js"),
    *(".ts", ".go", ".rs", ".sh"),
)
PROSE_SUFFIXES = (".txt", ".text")  # which say nothing of what is in them
JSONL_SUFFIXES = (".jsonl", ".ndjson")
JSON_SUFFIXES = (*JSONL_SUFFIXES, ".json")
COMPRESSIONS: dict[str, Literal[".gz", ".zst"]] = {".gz": ".gz", ".zst": ".zst", ".zstd": ".zst"}
TABLES = (".csv", ".tsv")
DANGLING = "link to nothing"
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".bz2", ".xz", ".rar")
NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


OnBad = Literal["stop", "skip", "replace"]


@dataclass(frozen=True, slots=True)
class Source:
    """One file of input. `name` is what messages call it; `validates`: it is named as validation text.

    "separated" is text with `separator` between documents, "json" objects in an array or over several lines.
    """

    path: str
    name: str
    format: Literal["text", "separated", "jsonl", "json", "parquet"]
    compression: Literal["", ".gz", ".zst"] = ""
    text_key: str = ""
    validates: bool = False
    separator: str = ""
    encoding: str = ""  # UTF-8 where it is empty
    on_bad: OnBad = "stop"

    @property
    def seekable(self) -> bool:
        """Whether a piece can be read without reading what is before it."""
        return self.format not in ("json", "parquet") and not self.compression and not self.encoding


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a source: bytes of its decompressed content, or rows of Parquet. `last`: it ends the source."""

    source: Source
    start: int
    stop: int
    last: bool


class Bad(NamedTuple):
    """A document that is not as it should be: its line, row or number in the piece from 0, and what is wrong."""

    number: int
    reason: str
    replaced: bool

    def place(self, source: Source, before: int) -> str:
        """Where it is and what is wrong, with `before` lines, rows or documents in the pieces before."""
        if source.format == "text":
            return f"{source.name} {self.reason}"
        word = {"jsonl": "line", "json": "object", "parquet": "row", "separated": "document"}[source.format]
        return f"{source.name}, {word} {before + self.number + 1:,}: {self.reason}"


class Content(NamedTuple):
    """What a piece holds: the text of its documents (of a text file: its part of the one) and a SHA-256 of it all.

    A bad document is an empty text, or has U+FFFD for what is wrong, as the source's `on_bad` says.
    """

    texts: list[str]
    digest: bytes
    bad: list[Bad]
    separators: int = 0  # lines that look as if they stood between documents


class Reader(Protocol):
    """An open source. Compressed and Parquet sources only go forward."""

    @property
    def consumed(self) -> int: ...  # bytes of the file read so far, for progress
    def pieces(self) -> Iterator[Piece]: ...
    def content(self, piece: Piece) -> Content: ...


def expand(
    inputs: Sequence[str],
    *,
    text_key: str,
    stdin: Source,
    left_out: Sequence[Path] = (),
    separator: str = "",
    encoding: str = "",
    on_bad: OnBad = "stop",
    ignored: dict[str, str] | None = None,
) -> list[Source]:
    """The sources that these --input values name, in order, each file once; `stdin` is what STDIN stands for.

    Nothing in `left_out`, real paths, is input. `ignored` takes the real paths of files in folders that are no text,
    and the suffix of each. Raises DataError for what is missing or holds no text, UsageError for what is not to be
    read, OSError for what cannot be.
    """
    ignored = {} if ignored is None else ignored
    sources: dict[str, Source] = {}
    for value in inputs:
        if value == STDIN:
            sources[STDIN] = stdin
            continue
        for file in _files_of(value, left_out, text_key, encoding, ignored):
            real = os.path.realpath(file)
            if real not in sources:
                sources[real] = source_of(
                    file, text_key=text_key, separator=separator, encoding=encoding, on_bad=on_bad
                )
    if not sources:
        raise DataError(f"--input names nothing but the output: {', '.join(inputs)}")
    return list(sources.values())


def standard_library() -> list[Source]:
    """Python's own standard library without its tests. Raises DataError where it is not a folder of files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(root, lambda folder: folder.name not in NOT_LIBRARY) if file.suffix == ".py"]
    if not files:
        raise DataError(f"Python's standard library is not in {root}: give texts of your own with --input")
    return [Source(str(file), str(file), "text") for file in files]


def source_of(path: Path, *, text_key: str, separator: str = "", encoding: str = "", on_bad: OnBad = "stop") -> Source:
    """What this file is, by its suffix and, where that does not tell, by how it begins.

    Raises UsageError for archives, for what is no file, and where an optional package is missing.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is neither a file nor a folder: pipe it in with --input -")
    inner, compression = _suffixes(path)
    if inner in ARCHIVES or (compression and inner == ".parquet"):
        raise UsageError(f"{path} is an archive: unpack it first")
    if inner in TABLES:
        raise UsageError(f"{path} is a table: {_conversion(path, inner)}")
    if compression == ".zst":
        _require("zstandard", path)
    if inner == ".parquet":
        _require("pyarrow", path)
        return Source(str(path), str(path), "parquet", "", text_key, on_bad=on_bad)
    as_text = Source(
        path=str(path),
        name=str(path),
        format="separated" if separator else "text",
        compression=compression,
        separator=separator,
        encoding=encoding,
        on_bad=on_bad,
    )
    if inner in JSON_SUFFIXES or (inner not in TEXT_SUFFIXES and _is_json(_head(as_text) or b"", text_key)):
        return as_json(as_text, text_key)
    return by_content(as_text, text_key) if inner in PROSE_SUFFIXES else as_text


def by_content(source: Source, text_key: str) -> Source:
    """A text file, as JSON where its first lines are objects of JSON that have this key: no prose begins so."""
    first, _, second = (_head(source) or b"").lstrip().partition(b"\n")
    text, wrong = _json_text(replace(source, text_key=text_key), first)
    return as_json(source, text_key) if text and not wrong and second.startswith(b"{") else source


def as_json(source: Source, text_key: str) -> Source:
    """The same file as objects of JSON: one a line, or in an array or over several lines as its beginning shows."""
    head = (_head(source) or b"").lstrip()
    is_whole = head.startswith(b"[") or head.partition(b"\n")[0].rstrip() == b"{"
    return replace(source, format="json" if is_whole else "jsonl", text_key=text_key, separator="")


def _suffixes(path: Path) -> tuple[str, Literal["", ".gz", ".zst"]]:
    """The suffix that says what is in the file, and the compression."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), COMPRESSIONS[suffix]
    return suffix, ""


def _conversion(path: Path, suffix: str) -> str:
    delimiter = "'\\t'" if suffix == ".tsv" else "','"
    program = (
        "import csv, json, sys; csv.field_size_limit(2**31 - 1); "
        f"[print(json.dumps(row)) for row in csv.DictReader(sys.stdin, delimiter={delimiter})]"
    )
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    read, written = shlex.quote(str(plain)), shlex.quote(str(plain.with_suffix(".jsonl")))
    return f'convert it, unpacked: python -c "{program}" < {read} > {written}'


def _is_json(head: bytes, text_key: str) -> bool:
    """Whether a file that begins like this is objects of JSON that have this key."""
    key = text_key.split(".")[-1]
    forms = (json.dumps(key).encode(), json.dumps(key, ensure_ascii=False).encode())
    return head.lstrip()[:1] in (b"{", b"[") and any(form in head for form in forms)


def _head(source: Source) -> bytes | None:
    """How the file begins, without a byte order mark; None where that cannot be read, which opening it says."""
    try:
        with open(source.path, "rb") as file:
            return _content_of(source, file).peek(0, HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    except (DataError, EOFError, OSError, zlib.error):
        return None


@contextmanager
def opened(source: Source) -> Iterator[Reader]:
    """Read a source. Raises DataError for content that is damaged or not text, OSError for what cannot be read."""
    try:
        with open(source.path, "rb") as file:
            if source.format == "parquet":
                yield _Rows(source, file)
            else:
                yield _Bytes(source, _content_of(source, file))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source.name}: damaged or cut short ({error})") from None


def document_hash(source: Source) -> int:
    """`text_hash` of a text source that is too long for one piece."""
    digest = hashlib.blake2b(digest_size=8)
    with opened(source) as reader:
        for piece in reader.pieces():
            digest.update(reader.content(piece).texts[0].encode())
    return int.from_bytes(digest.digest(), "big")


def utf8_size(text: str) -> int:
    """How many bytes `text` has in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def text_hash(text: bytes) -> int:
    """A 64-bit hash of a document's UTF-8 text, which decides its split."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _files_of(
    value: str, left_out: Sequence[Path], text_key: str, encoding: str, ignored: dict[str, str]
) -> list[Path]:
    """The files that an --input value names. Raises DataError where there is none, UsageError, OSError."""
    if not value:
        raise UsageError("an --input is empty: name a file, a folder or a pattern")
    named = Path(value)
    if named.is_symlink() and not named.exists():
        raise DataError(f"no such input: {value} is a link to {os.readlink(named)}, which is not there")
    matches = [named] if named.exists() else [Path(match) for match in sorted(glob.glob(value, recursive=True))]
    if not matches:
        raise DataError(f"no such input: {value}")
    found = [file for path in matches for file in _files_in(path, left_out, text_key, encoding, ignored)]
    # A shell that expands * names the output of an earlier start.
    if not found and not _is_in(named, left_out):
        key = f" (.json where it begins with an object that has the key {text_key!r}: --text-key names another)"
        raise DataError(
            f"{value} holds no text: of a folder, files count that end in {', '.join(folder_suffixes())}"
            f"{key if any('.json' in suffix for suffix in ignored.values()) else ''}"
        )
    return found


def _files_in(
    path: Path, left_out: Sequence[Path], text_key: str, encoding: str, ignored: dict[str, str]
) -> list[Path]:
    """The file, or the files below the folder that count; hidden ones do not. Raises OSError."""
    if _is_in(path, left_out):
        return []
    if not path.exists():
        ignored[os.path.realpath(path)] = DANGLING
        return []
    if not path.is_dir():
        return [path]
    found = []
    for file in _walk(path, lambda folder: not folder.name.startswith(".") and not _is_in(folder, left_out)):
        if file.name.startswith("."):
            continue
        if not file.exists():
            ignored[os.path.realpath(file)] = DANGLING
        elif _counts(file, text_key, encoding):
            found.append(file)
        else:
            suffixes = file.suffixes[-2:] if file.suffix in COMPRESSIONS else [file.suffix]
            ignored[os.path.realpath(file)] = "".join(suffixes)
    return found


def _walk(folder: Path, enters: Callable[[Path], bool]) -> list[Path]:
    """All files below a folder, sorted. Links to folders are followed, each folder is entered once. Raises OSError."""

    def fail(error: OSError) -> None:
        raise error

    found, entered = [], {os.path.realpath(folder)}

    def is_new(path: Path) -> bool:
        real = os.path.realpath(path)
        known = real in entered
        entered.add(real)
        return not known

    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        found += [Path(root, name) for name in names]
        paths = [Path(root, name) for name in sorted(folders)]
        folders[:] = [path.name for path in paths if enters(path) and is_new(path)]
    return sorted(found, key=lambda path: path.parts)


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(folder) for folder in folders)


def folder_suffixes() -> list[str]:
    """The endings of the files that count in a folder; all but Parquet also with .gz, .zst or .zstd after them."""
    return [*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet"]


def _counts(path: Path, text_key: str, encoding: str) -> bool:
    inner, compression = _suffixes(path)
    if inner == ".json":  # which settings are as well
        if compression == ".zst":
            _require("zstandard", path)
        head = _head(Source(str(path), str(path), "text", compression, encoding=encoding))
        return head is None or _is_json(head, text_key)  # what cannot be read is not left out without a word
    return inner in folder_suffixes() and not (compression and inner == ".parquet")


def _require(module: str, path: Path) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"reading {path} needs the package {module}: pip install {module}")


class _Content(Protocol):
    """Bytes at offsets. `end` is the length where it is known; it is once `peek` came back short.

    After `forget(offset)` nothing before the offset is asked for again.
    """

    end: int | None

    @property
    def consumed(self) -> int: ...
    def peek(self, offset: int, size: int) -> bytes: ...
    def forget(self, offset: int) -> None: ...


class _File:
    """A plain file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.end: int | None = os.fstat(file.fileno()).st_size
        self.consumed = 0

    def peek(self, offset: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(self._file.fileno(), size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        self.consumed = offset
        return b"".join(parts)

    def forget(self, offset: int) -> None:
        pass


class _Stream:
    """A file that is compressed or has another encoding: only goes forward."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self._file = file
        self._stream: Any = file
        if source.compression:
            self._stream = gzip.GzipFile(fileobj=file) if source.compression == ".gz" else ZstdStream(source, file)
        if source.encoding:
            self._stream = _Recoded(self._stream, source.encoding)
        self._buffer = bytearray()
        self._base = self._needed = 0
        self.end: int | None = None

    @property
    def consumed(self) -> int:
        return self._file.tell()

    def peek(self, offset: int, size: int) -> bytes:
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
        self._needed = offset
        passed = min(max(offset - self._base, 0), len(self._buffer))
        del self._buffer[:passed]
        self._base += passed


def _content_of(source: Source, file: BinaryIO) -> _Content:
    """The file's bytes, decompressed, in UTF-8 whatever its encoding."""
    return _Stream(source, file) if source.compression or source.encoding else _File(file)


def _mark_bad(error: UnicodeError) -> tuple[str | bytes, int]:
    """A byte 0xFF, which UTF-8 does not have, for what cannot be decoded and for half a character."""
    if isinstance(error, UnicodeDecodeError):
        return HALF_FOR_BAD, error.end
    assert isinstance(error, UnicodeEncodeError)
    return b"\xff" * (error.end - error.start), error.end


HALF_FOR_BAD = "\udcff"
codecs.register_error(MARK_BAD, _mark_bad)


class _Recoded(io.RawIOBase):
    """A stream of another encoding as UTF-8, with a byte 0xFF for what is not in that encoding."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(MARK_BAD)
        self._ended = False

    def read(self, size: int = -1) -> bytes:
        """The next bytes, more or fewer than `size` but never many; none at the end."""
        while not self._ended:
            raw = self._stream.read(size)
            self._ended = not raw
            try:
                text = self._decoder.decode(raw, final=self._ended)
            except UnicodeError:  # no byte order mark: nothing can be decoded
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
        """The next bytes, more or fewer than `size` but never many; none at the end. Raises DataError."""
        while True:
            packed = self._rest or self._file.read(ZSTD_BYTES)
            if not packed:
                if self._started:
                    raise DataError(f"{self._source.name}: damaged or cut short (its last frame has no end)")
                return b""
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


class _Bytes:
    """Text or JSON."""

    def __init__(self, source: Source, content: _Content) -> None:
        self._source = source
        self._content = content

    @property
    def consumed(self) -> int:
        return self._content.consumed

    def pieces(self) -> Iterator[Piece]:
        # A byte order mark alone is an empty text.
        start, last = 0, self._content.peek(0, 4) in (b"", codecs.BOM_UTF8)
        while not last:
            stop = self._object_end(start) if self._source.format == "json" else self._cut(start + UNIT_BYTES)
            last = not self._content.peek(stop, 1)
            yield Piece(self._source, start, stop, last)
            start = stop

    def content(self, piece: Piece) -> Content:
        self._content.forget(piece.start)
        raw, start = self._content.peek(piece.start, piece.stop - piece.start), piece.start
        if start == 0 and raw.startswith(codecs.BOM_UTF8):  # which marks the encoding and is no part of the text
            raw, start = raw.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        digest = hashlib.sha256(f"{self._source.format}\n{self._source.text_key}\n".encode() + raw).digest()
        if piece.start == 0 and (utf16 := _utf16_in(raw)):
            reason = f"is UTF-16, not UTF-8: --encoding {utf16} reads it, where all of the input is"
            return _content(self._source, [("", reason)], digest)
        if self._source.format == "jsonl":
            return _content(self._source, (_json_text(self._source, line) for line in _lines(raw)), digest)
        if self._source.format == "json":
            return _content(self._source, (_json_text(self._source, found) for found in _objects(raw)), digest)
        if self._source.format == "separated":
            parts = _separator(self._source.separator).split(raw)
            documents = parts if parts[-1] else parts[:-1]
            return _content(self._source, (_decoded(self._source, part) for part in documents), digest, len(parts) - 1)
        return _content(self._source, [_decoded(self._source, raw, start)], digest, _separators_in(raw))

    def _cut(self, target: int) -> int:
        """The first offset from `target` on where the content can be cut, or its end. Raises DataError."""
        find: Callable[[bytes], int | None] = _line_end
        overlap, limit = 16, None
        if self._source.format == "text":
            find, limit = _word_end, target + 3 * UNIT_BYTES
        elif self._source.format == "separated":
            separator = _separator(self._source.separator)
            find, limit = _end_of(separator), target + SEPARATED_BYTES
            overlap = len(self._source.separator.encode()) + 4  # and the line ends around it
            # Where the separator ends there may be a line end yet to come, which is a part of it.
            target = max(target - overlap, 0)
        position = target
        while window := self._content.peek(position, WINDOW_BYTES):
            found = find(window)
            if found is not None:
                return position + found
            # Windows overlap by more than a character on both sides of the cut.
            position += max(len(window) - overlap, 1) if len(window) == WINDOW_BYTES else len(window)
            if limit is not None and position > limit:
                if self._source.format == "separated":
                    raise DataError(
                        f"{self._source.name}: no {self._source.separator!r} in {SEPARATED_BYTES / 2**30:g} GiB, "
                        f"from byte {target:,} on: is it what --document-separator is to name?"
                    )
                # One run without a space, longer than three units: cut between characters, BPE ids may differ there.
                window = self._content.peek(position, 4)
                return position + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)
        assert self._content.end is not None
        return self._content.end

    def _object_end(self, start: int) -> int:
        """The end of the first object that ends UNIT_BYTES after `start`, which is in none, or of the content."""
        position, size, level = start, WINDOW_BYTES, 0
        while window := self._content.peek(position, size):
            used = len(window)
            for token in _JSON_TOKEN.finditer(window):
                level, ends = _nesting(level, token.group())
                if ends and position + token.end() >= start + UNIT_BYTES:
                    return position + token.end()
                if token.group() == b'"':  # a string that goes on after the window
                    used = token.start()
                    break
            if used == 0 and len(window) < size:
                break
            position, size = (position + used, WINDOW_BYTES) if used else (position, 2 * size)
        assert self._content.end is not None
        return self._content.end


# Lines that others write between the documents of a text file.
_SEPARATOR_LINES = re.compile(rb"(?m)^(?:<\|endoftext\|>|<\|end_of_text\|>|</s>)[ \t\r]*$")
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}"]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def _content(source: Source, documents: Iterable[tuple[str, str]], digest: bytes, separators: int = 0) -> Content:
    """What a piece holds, from the text of each document and what is wrong with it, if anything."""
    texts, bad = [], []
    for index, (text, wrong) in enumerate(documents):
        if not wrong:
            texts.append(text)
            continue
        is_replaced = source.on_bad == "replace" and text != ""
        bad.append(Bad(index, wrong, is_replaced))
        texts.append(text if is_replaced else "")
    return Content(texts, digest, bad, separators)


def _utf16_in(raw: bytes) -> str:
    """The UTF-16 of a file that begins like this: by its mark, or by the zeros in Latin letters; "" for none."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    head = raw[:1000]
    zeros, name = max((head[0::2].count(0), "utf-16-be"), (head[1::2].count(0), "utf-16-le"))
    return name if zeros > max(len(head) // 4, 1) else ""


def _separators_in(raw: bytes) -> int:
    return len(_SEPARATOR_LINES.findall(raw)) if b"<|end" in raw or b"</s>" in raw else 0


@lru_cache
def _separator(text: str) -> re.Pattern[bytes]:
    """The separator of documents with a line end on either side."""
    return re.compile(rb"(?:\r?\n)?" + re.escape(text.encode()) + rb"(?:\r?\n)?")


def _end_of(separator: re.Pattern[bytes]) -> Callable[[bytes], int | None]:
    def find(window: bytes) -> int | None:
        match = separator.search(window)
        # What ends with the window may go on after it, which the next window shows, unless the content ends there.
        return match.end() if match and (match.end() + 2 <= len(window) or len(window) < WINDOW_BYTES) else None

    return find


def _line_end(window: bytes) -> int | None:
    return window.find(b"\n") + 1 or None


# A lone newline or space between two characters that are not whitespace. GPT-2's pattern always starts a new word at
# whitespace that follows something else, and looks back at nothing, so both sides encode as they do in one go. Halves
# of characters at the window's ends decode to lone surrogates, which do not count.
_WORD_END = re.compile(r"(?<=[^\s\udc80-\udcff])[\n ](?=[^\s\udc80-\udcff])")


def _word_end(window: bytes) -> int | None:
    text = window.decode("utf-8", "surrogateescape")
    match = _WORD_END.search(text)
    return len(text[: match.start()].encode("utf-8", "surrogateescape")) if match else None


def _decoded(source: Source, raw: bytes, start: int | None = None) -> tuple[str, str]:
    """The text, with U+FFFD for what is not UTF-8, and what is wrong with it. `start`: where in the file it is."""
    try:
        return raw.decode(), ""
    except UnicodeDecodeError as error:
        at, reason = error.start, error.reason
    text = raw.decode(errors="replace")
    if source.encoding:
        hint = f" (without a byte order mark: {source.encoding}-le or {source.encoding}-be)"
        return text, f"is not {source.encoding}{hint if source.encoding in ('utf-16', 'utf-32') else ''}"
    if start is None:
        return text, f"not UTF-8, byte {at:,} of the document ({reason})"
    inside = " of its decompressed content" if source.compression else ""
    return text, f"is not UTF-8: byte {start + at:,}{inside} ({reason}); --encoding names another"


def _lines(raw: bytes) -> list[bytes]:
    lines = raw.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _objects(raw: bytes) -> Iterator[bytes]:
    """The objects in a part of a JSON array, or one after another; also what is there instead of one."""
    start = level = 0
    for token in _JSON_TOKEN.finditer(raw):
        level, ends = _nesting(level, token.group())
        if ends:
            yield raw[start : token.end()].lstrip(b"[, \t\r\n")
            start = token.end()
    if rest := raw[start:].strip(b"[], \t\r\n"):
        yield rest


def _nesting(level: int, token: bytes) -> tuple[int, bool]:
    """How many braces are open after this token, and whether it ends the outermost object."""
    if token == b"{":
        return level + 1, False
    if token == b"}":
        return max(level - 1, 0), level <= 1
    return level, False


def _json_text(source: Source, raw: bytes) -> tuple[str, str]:
    """The text in an object of JSON and what is wrong with it; an empty line is an empty text."""
    if not raw or raw.isspace():
        return "", ""
    try:
        text = _value(orjson.loads(raw), source.text_key)
    except (ValueError, KeyError, TypeError):
        return _odd_json_text(source.text_key, raw)
    return (text, "") if isinstance(text, str) else _odd_json_text(source.text_key, raw)


def _value(content: Any, key: str) -> Any:
    """What has this key: itself, or with dots, the keys of objects in objects. Raises KeyError, TypeError."""
    if key in content or "." not in key:
        return content[key]
    first, _, rest = key.partition(".")
    return _value(content[first], rest)


def _odd_json_text(key: str, raw: bytes) -> tuple[str, str]:
    """As `_json_text`, for what the strict and fast reader refuses: NaN, half a surrogate pair, and what is bad."""
    wrong = ""
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        line, wrong = raw.decode(errors="replace"), f"not UTF-8, byte {error.start:,} of the line ({error.reason})"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        # An array of texts comes in one.
        return "", wrong or ("not a JSON object but str" if line.startswith('"') else f"not JSON ({error})")
    if not isinstance(content, dict):
        return "", wrong or f"not a JSON object but {type(content).__name__}"
    try:
        text = _value(content, key)
    except (KeyError, TypeError):
        keys = ", ".join(sorted(content)[:8]) or "none"
        return "", wrong or f"no key {key!r} (there are: {keys}); --text-key names the one to read"
    if not isinstance(text, str):
        return "", wrong or f"{key!r} is not a text but {type(text).__name__}"
    if half := _SURROGATE.search(text):
        text, wrong = _SURROGATE.sub("\ufffd", text), wrong or f"{key!r} holds half a character (U+{ord(half[0]):04X})"
    return text, wrong


class _Rows:
    """A column of Parquet, row by row."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        import pyarrow
        import pyarrow.parquet

        self._source = source
        self._error = pyarrow.ArrowException
        self._size = os.fstat(file.fileno()).st_size
        with self._damage_named():
            self._file = pyarrow.parquet.ParquetFile(file)
            schema = self._file.schema_arrow
        self._fields = _fields(schema, source.text_key)
        if not self._fields:
            names = ", ".join(schema.names[:8])
            raise DataError(
                f"{source.name}: no column {source.text_key!r} (there are: {names}); --text-key names the one to read"
            )
        self._rows: int = self._file.metadata.num_rows
        self._row = 0  # the number of the next one to read from the file
        self._texts: Iterator[tuple[str, str]] | None = None
        self._ahead: deque[tuple[str, str]] = deque()  # what `pieces` read to find where a piece ends

    @property
    def consumed(self) -> int:
        return self._size * self._row // max(self._rows, 1)

    def pieces(self) -> Iterator[Piece]:
        # What the file says of its sizes is before a dictionary is applied: a short one may hold any amount of text.
        self._texts = self._read(0)
        start = size = 0
        for text, wrong in self._texts:
            self._ahead.append((text, wrong))
            size += utf8_size(text) + PARQUET_ROW_BYTES
            if size >= UNIT_BYTES or self._row == self._rows:
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
        return _content(self._source, rows, digest.digest())

    def _read(self, start: int) -> Iterator[tuple[str, str]]:
        """The text of each row from `start` on and what is wrong with it; `_row` is the number of the next one."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        passed = 0
        while start and sizes[passed] <= start:
            start -= sizes[passed]
            passed += 1
        with self._damage_named():
            batches = self._file.iter_batches(
                PARQUET_BATCH,
                row_groups=range(passed, len(sizes)),
                columns=[self._source.text_key],
                use_threads=False,
            )
            for batch in batches:
                for value in batch.column(0)[start:]:
                    self._row += 1
                    yield _row_text(value, self._fields, self._source.text_key)
                start = max(start - len(batch), 0)

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (self._error, OSError) as error:
            raise DataError(f"{self._source.name}: damaged or not Parquet ({str(error).splitlines()[0]})") from None


def _fields(schema: Any, key: str) -> list[str]:
    """The column that has this key, and the fields below it that its dots name; none where there is no such column."""
    if key in schema.names:
        return [key]
    names, fields = key.split("."), {field.name: field.type for field in schema}
    for name in names[:-1]:
        kind = fields.get(name)
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} if kind is not None else {}
    return names if names[-1] in fields else []


def _row_text(value: Any, fields: Sequence[str], key: str) -> tuple[str, str]:
    """The text in a row's value and what is wrong with it."""
    for name in fields[1:]:
        value = value[name] if value.is_valid else value
    value = getattr(value, "value", value)  # what an entry of a dictionary stands for
    content = value.as_buffer().to_pybytes() if value.is_valid and hasattr(value, "as_buffer") else value.as_py()
    if not isinstance(content, bytes):
        return "", f"{key!r} is not a text but {type(content).__name__}"
    try:
        return content.decode(), ""
    except UnicodeDecodeError as error:
        return content.decode(errors="replace"), f"not UTF-8, byte {error.start:,} of the text ({error.reason})"
