"""The format of a file: by its suffix or, if that does not decide, by its first bytes."""

import codecs
import importlib.util
import json
import shlex
import zlib
from dataclasses import replace
from pathlib import Path

from distgpt.corpus.reading import json_text
from distgpt.corpus.reading.sources import Compression, ReadOptions, Source
from distgpt.corpus.reading.streams import SourceBytes
from distgpt.errors import DataError, UsageError

HEAD_BYTES = 2**16  # of a file, to see whether it is JSON
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", ".c", ".h", ".cc", ".cpp", ".cu", ".java", ".js"),
    *(".ts", ".go", ".rs", ".sh"),
)
PROSE_SUFFIXES = (".txt", ".text")  # such a file may hold JSON
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet")
COMPRESSIONS: dict[str, Compression] = {".gz": ".gz", ".zst": ".zst", ".zstd": ".zst"}
TABLES = (".csv", ".tsv")
ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".bz2", ".xz", ".rar")


def source_of(path: Path, options: ReadOptions, name: str = "") -> Source:
    """Return the source for a file; `name`: that for messages, if it is not the path.

    Raises UsageError for archives, tables, pipes and missing packages.
    """
    name = name or str(path)
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is neither a file nor a folder: pipe it in with --input -")
    content_suffix, compression = _suffixes(path)
    if content_suffix in ARCHIVES or (compression and content_suffix == ".parquet"):
        raise UsageError(f"{name} is an archive: unpack it first")
    if content_suffix in TABLES:
        raise UsageError(f"{name} is a table: {_conversion(path, content_suffix)}")
    if compression == ".zst":
        _require("zstandard", name)
    if content_suffix == ".parquet":
        _require("pyarrow", name)
        return Source(str(path), name, "parquet", "", options)
    source = Source(str(path), name, "separated" if options.separator else "text", compression, options)
    if content_suffix in JSON_SUFFIXES or (
        content_suffix not in TEXT_SUFFIXES and _is_json(_head(source) or b"", options.text_key)
    ):
        return as_json(source)
    return as_text_or_json(source) if content_suffix in PROSE_SUFFIXES else source


def as_text_or_json(source: Source) -> Source:
    """Return the source: as JSON if its first line is an object with the key, and its second begins another one."""
    first, _, second = (_head(source) or b"").lstrip().partition(b"\n")
    text, reason = json_text.text_of(source.options.text_key, first)
    return as_json(source) if text and not reason and second.startswith(b"{") else source


def as_json(source: Source) -> Source:
    """Return the source as JSON: "jsonl", or "json" if it begins with an array or an object over several lines."""
    head = (_head(source) or b"").lstrip()
    is_whole = head.startswith(b"[") or head.partition(b"\n")[0].rstrip() == b"{"
    return replace(source, format="json" if is_whole else "jsonl")


def is_input_in_folder(path: Path, options: ReadOptions) -> bool:
    """Return True if a file is input where only its folder was named."""
    content_suffix, compression = _suffixes(path)
    if content_suffix == ".json":  # a file of settings may end in .json as well
        head = _head(Source(str(path), str(path), "text", compression, options))
        return head is None or _is_json(head, options.text_key)  # an unreadable file is reported when it is read
    return content_suffix in FOLDER_SUFFIXES and not (compression and content_suffix == ".parquet")


def _suffixes(path: Path) -> tuple[str, Compression]:
    """Return the suffix for the content of the file, and the compression."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), COMPRESSIONS[suffix]
    return suffix, ""


def _conversion(path: Path, suffix: str) -> str:
    """Return a command that converts a table to JSON lines."""
    delimiter = "'\\t'" if suffix == ".tsv" else "','"
    program = (
        "import csv, json, sys; csv.field_size_limit(2**31 - 1); "
        f"[print(json.dumps(row)) for row in csv.DictReader(sys.stdin, delimiter={delimiter})]"
    )
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    read, written = shlex.quote(str(plain)), shlex.quote(str(plain.with_suffix(".jsonl")))
    return f'convert it, unpacked: python -c "{program}" < {read} > {written}'


def _is_json(head: bytes, text_key: str) -> bool:
    """Return True if a file with this beginning holds JSON objects with this key."""
    key = text_key.split(".")[-1]
    forms = (json.dumps(key).encode(), json.dumps(key, ensure_ascii=False).encode())
    return head.lstrip()[:1] in (b"{", b"[") and any(form in head for form in forms)


def _head(source: Source) -> bytes | None:
    """Return the first bytes of a file without a byte order mark; None if they cannot be read."""
    try:
        with open(source.path, "rb") as file:
            return SourceBytes(source, file).peek(0, HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    except (DataError, EOFError, ImportError, OSError, zlib.error):
        return None


def _require(module: str, name: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"reading {name} needs the package {module}: pip install {module}")
