"""Files, folders, JSON Lines, Parquet, .gz and .zst as documents, in pieces of bounded size.

A text file is one document; a line of JSON Lines or a row of Parquet is one document each. A source is cut into pieces
of about UNIT_BYTES of text: what one worker holds in memory at a time. A document longer than that continues over
several pieces.
"""

import codecs
import glob
import gzip
import hashlib
import importlib.util
import io
import os
import re
import sysconfig
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import orjson

from distgpt.errors import DataError, UsageError

UNIT_BYTES = 8 * 2**20
WINDOW_BYTES = 2**16
PARQUET_BATCH = 16
PARQUET_ROW_BYTES = 64  # what a row takes in memory besides its text, so that a piece of empty ones ends too
ZSTD_BYTES = 2**10  # each four of which may hold 128 KiB

STDIN = "-"
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".java", ".js"),
    *(".ts", ".go", ".rs", ".sh"),
)
JSONL_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".bz2", ".xz", ".rar")
NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class Source:
    """One file of input. `name` is what messages call it; `validates`: it is named as validation text."""

    path: str
    name: str
    format: Literal["text", "jsonl", "parquet"]
    compression: Literal["", ".gz", ".zst"] = ""
    text_key: str = ""
    validates: bool = False

    @property
    def seekable(self) -> bool:
        """Whether a piece can be read without reading what is before it."""
        return self.format != "parquet" and not self.compression


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a source: bytes of its decompressed content, or rows of Parquet. `last`: it ends the source."""

    source: Source
    start: int
    stop: int
    last: bool


class Content(NamedTuple):
    """What a piece holds: the text of its documents (of a text file: its part of the one) and a SHA-256 of it all."""

    texts: list[str]
    digest: bytes


class Reader(Protocol):
    """An open source. Compressed and Parquet sources only go forward."""

    @property
    def consumed(self) -> int: ...  # bytes of the file read so far, for progress
    def pieces(self) -> Iterator[Piece]: ...
    def content(self, piece: Piece) -> Content: ...


def expand(inputs: Sequence[str], *, text_key: str, stdin: Source, left_out: Sequence[Path] = ()) -> list[Source]:
    """The sources that these --input values name, in order, each file once; `stdin` is what STDIN stands for.

    Nothing in `left_out`, real paths, is input. Raises DataError for what is missing or holds no text, UsageError for
    what is not to be read, OSError for what cannot be.
    """
    sources: dict[str, Source] = {}
    for value in inputs:
        if value == STDIN:
            sources[STDIN] = stdin
            continue
        for file in _files_of(value, left_out):
            sources.setdefault(os.path.realpath(file), source_of(file, text_key=text_key))
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


def source_of(path: Path, *, text_key: str) -> Source:
    """What this file is, by its suffix.

    Raises UsageError for archives, for what is no file, and where an optional package is missing.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is neither a file nor a folder: pipe it in with --input -")
    suffix = path.suffix.lower()
    compression: Literal["", ".gz", ".zst"] = ".gz" if suffix == ".gz" else ".zst" if suffix == ".zst" else ""
    inner = Path(path.stem).suffix.lower() if compression else suffix
    if inner in ARCHIVES or (compression and inner == ".parquet"):
        raise UsageError(f"{path} is an archive: unpack it first")
    if compression == ".zst":
        _require("zstandard", "zstd", path)
    if inner == ".parquet":
        _require("pyarrow", "parquet", path)
        return Source(str(path), str(path), "parquet", "", text_key)
    if inner in JSONL_SUFFIXES:
        return Source(str(path), str(path), "jsonl", compression, text_key)
    return Source(str(path), str(path), "text", compression)


@contextmanager
def opened(source: Source) -> Iterator[Reader]:
    """Read a source. Raises DataError for content that is damaged or not text, OSError for what cannot be read."""
    try:
        with open(source.path, "rb") as file:
            if source.format == "parquet":
                yield _Rows(source, file)
            elif source.compression:
                yield _Bytes(source, _Stream(source, file))
            else:
                yield _Bytes(source, _File(file))
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


def _files_of(value: str, left_out: Sequence[Path]) -> list[Path]:
    """The files that an --input value names. Raises DataError where there is none, UsageError, OSError."""
    if not value:
        raise UsageError("an --input is empty: name a file, a folder or a pattern")
    named = Path(value)
    matches = [named] if named.exists() else [Path(match) for match in sorted(glob.glob(value, recursive=True))]
    if not matches:
        raise DataError(f"no such input: {value}")
    found = [file for path in matches for file in _files_in(path, left_out)]
    # A shell that expands * names the output of an earlier start.
    if not found and not _is_in(named, left_out):
        raise DataError(f"{value} holds no text: of a folder, files count that end in {', '.join(folder_suffixes())}")
    return found


def _files_in(path: Path, left_out: Sequence[Path]) -> list[Path]:
    """The file, or the files below the folder that count; hidden ones do not. Raises OSError."""
    if _is_in(path, left_out):
        return []
    if not path.is_dir():
        return [path]
    found = _walk(path, lambda folder: not folder.name.startswith(".") and not _is_in(folder, left_out))
    return [file for file in found if not file.name.startswith(".") and _counts(file.name)]


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
    """The endings of the files that count in a folder; texts and JSON Lines also with .gz or .zst after them."""
    return [*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet"]


def _counts(name: str) -> bool:
    path = Path(name.lower())
    if path.suffix in COMPRESSIONS:
        return Path(path.stem).suffix in (*TEXT_SUFFIXES, *JSONL_SUFFIXES)
    return path.suffix in folder_suffixes()


def _require(module: str, extra: str, path: Path) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"reading {path} needs the package {module}: pip install 'distgpt[{extra}]'")


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
    """A compressed file: only goes forward."""

    def __init__(self, source: Source, file: BinaryIO) -> None:
        self._file = file
        self._stream: Any = gzip.GzipFile(fileobj=file) if source.compression == ".gz" else ZstdStream(source, file)
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
    """Text or JSON Lines."""

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
            stop = self._cut(start + UNIT_BYTES)
            last = not self._content.peek(stop, 1)
            yield Piece(self._source, start, stop, last)
            start = stop

    def content(self, piece: Piece) -> Content:
        self._content.forget(piece.start)
        raw, start = self._content.peek(piece.start, piece.stop - piece.start), piece.start
        if start == 0 and raw.startswith(codecs.BOM_UTF8):  # which marks the encoding and is no part of the text
            raw, start = raw.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
        digest = hashlib.sha256(f"{self._source.format}\n{self._source.text_key}\n".encode() + raw).digest()
        if self._source.format == "text":
            return Content([_decoded(self._source, raw, start)], digest)
        return Content(_json_texts(self._source, raw, start), digest)

    def _cut(self, target: int) -> int:
        """The first offset from `target` on where the content can be cut, or its end."""
        find = _line_end if self._source.format == "jsonl" else _word_end
        limit = target + 3 * UNIT_BYTES if self._source.format == "text" else None
        position = target
        while window := self._content.peek(position, WINDOW_BYTES):
            found = find(window)
            if found is not None:
                return position + found
            # Windows overlap by more than a character on both sides of the cut.
            position += max(len(window) - 16, 1) if len(window) == WINDOW_BYTES else len(window)
            if limit is not None and position > limit:
                # One run without a space, longer than three units: cut between characters, BPE ids may differ there.
                window = self._content.peek(position, 4)
                return position + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), 0)
        assert self._content.end is not None
        return self._content.end


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


def _decoded(source: Source, raw: bytes, start: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        inside = " of its decompressed content" if source.compression else ""
        raise DataError(f"{source.name} is not UTF-8: byte {start + error.start:,}{inside} ({error.reason})") from None


def _json_texts(source: Source, raw: bytes, start: int) -> list[str]:
    texts = []
    for index, line in enumerate(raw.split(b"\n")):
        if not line or line.isspace():
            continue
        try:
            text = orjson.loads(line)[source.text_key]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise _line_error(source, line, _lines_before(source, start) + index + 1)
        texts.append(text)
    return texts


def _line_error(source: Source, line: bytes, number: int) -> DataError:
    where = f"{source.name}, line {number:,}"
    try:
        content = orjson.loads(line.decode())
    except UnicodeDecodeError as error:
        return DataError(f"{where}: not UTF-8, byte {error.start:,} of the line ({error.reason})")
    except ValueError as error:
        return DataError(f"{where}: not JSON ({error})")
    if not isinstance(content, dict):
        return DataError(f"{where}: not a JSON object but {type(content).__name__}")
    if source.text_key not in content:
        keys = ", ".join(sorted(content)[:8]) or "none"
        return DataError(f"{where}: no key {source.text_key!r} (there are: {keys}); --text-key names the one to read")
    return DataError(f"{where}: {source.text_key!r} is not a text but {type(content[source.text_key]).__name__}")


def _lines_before(source: Source, offset: int) -> int:
    count, step = 0, 2**20
    with open(source.path, "rb") as file:
        content: _Content = _Stream(source, file) if source.compression else _File(file)
        for at in range(0, offset, step):
            content.forget(at)
            count += content.peek(at, min(step, offset - at)).count(b"\n")
    return count


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
        if source.text_key not in schema.names:
            names = ", ".join(schema.names[:8])
            raise DataError(
                f"{source.name}: no column {source.text_key!r} (there are: {names}); --text-key names the one to read"
            )
        self._rows: int = self._file.metadata.num_rows
        self._row = 0  # the number of the next one to read from the file
        self._texts: Iterator[str] | None = None
        self._ahead: deque[str] = deque()  # what `pieces` read to find where a piece ends

    @property
    def consumed(self) -> int:
        return self._size * self._row // max(self._rows, 1)

    def pieces(self) -> Iterator[Piece]:
        # What the file says of its sizes is before a dictionary is applied: a short one may hold any amount of text.
        self._texts = self._read(0)
        start = size = 0
        for text in self._texts:
            self._ahead.append(text)
            size += utf8_size(text) + PARQUET_ROW_BYTES
            if size >= UNIT_BYTES or self._row == self._rows:
                yield Piece(self._source, start, self._row, self._row == self._rows)
                start, size = self._row, 0

    def content(self, piece: Piece) -> Content:
        if self._texts is None:
            self._row = piece.start
            self._texts = self._read(piece.start)
        assert piece.start == self._row - len(self._ahead), "a Parquet source was not read in order"
        texts = [self._ahead.popleft() if self._ahead else next(self._texts) for _ in range(piece.start, piece.stop)]
        digest = hashlib.sha256(f"parquet\n{self._source.text_key}\n".encode())
        for text in texts:
            raw = text.encode()
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return Content(texts, digest.digest())

    def _read(self, start: int) -> Iterator[str]:
        """The texts of the rows from `start` on; `_row` is the number of the next one."""
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
                    text = value.as_py()
                    if not isinstance(text, str):
                        raise DataError(
                            f"{self._source.name}, row {self._row + 1:,}: {self._source.text_key!r} is not a text "
                            f"but {type(text).__name__}"
                        )
                    self._row += 1
                    yield text
                start = max(start - len(batch), 0)

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise DataError(f"{self._source.name}, row {self._row + 1:,}: not UTF-8 ({error.reason})") from None
        except (self._error, OSError) as error:
            raise DataError(f"{self._source.name}: damaged or not Parquet ({str(error).splitlines()[0]})") from None
