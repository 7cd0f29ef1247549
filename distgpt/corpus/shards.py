"""The prepared directory: uint16 tokens on disk, written once, hashed, opened as memory maps, verified.

train-00000.bin  val-00000.bin      raw little-endian uint16 tokens, no header
train-00000.idx  val-00000.idx      uint64, documents + 1 token offsets into the .bin of the same name
tokenizer.json   meta.json          meta.json is written last: a directory without it is not a dataset
train.bin  val.bin  meta.pkl        for nanoGPT, where a split is one shard: links and a pickle that nothing here reads
"""

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import pickle
import re
import resource
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from distgpt.corpus.tokenizer import FILE_NAME as TOKENIZER
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.errors import DataError
from distgpt.files import sync, write_file

META = "meta.json"
VERIFIED = ".verified.json"
FORMAT = "distgpt-dataset"
VERSION = 1
DTYPE = np.dtype("<u2")
CHUNK_BYTES = 2**22

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")


class NotWholeError(DataError):
    """A directory that holds no dataset, or what is left of one: nothing is lost where it is overwritten."""


@dataclass(frozen=True)
class Shard:
    """What meta.json says of one .bin and its .idx. `bytes`: UTF-8 bytes of text that the tokens stand for."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """The tokens of one split: one uint16 (tokens,) memory map per shard."""

    name: str
    shards: tuple[np.memmap[Any, np.dtype[np.uint16]], ...]

    @property
    def tokens(self) -> int:
        return sum(shard.size for shard in self.shards)


@dataclass(frozen=True)
class Dataset:
    """A prepared directory. `fingerprint` identifies its tokens and tokenizer, wherever the directory lies."""

    path: Path
    meta: dict[str, Any]
    vocab_size: int
    eot_id: int | None
    fingerprint: str
    train: Split
    val: Split


def open_dataset(path: Path) -> Dataset:
    """Memory-map a prepared directory after checking that it is whole: meta.json, format, file sizes.

    Raises DataError for what is missing, not a dataset or cut short. Hashes are `verify_dataset`'s business.
    """
    meta = read_meta(path)
    _allow_open_files()
    try:
        _check_files(path, meta)
        return Dataset(
            path=path,
            meta=meta,
            vocab_size=int(meta["vocab_size"]),
            eot_id=None if meta["eot_id"] is None else int(meta["eot_id"]),
            fingerprint=_fingerprint(meta),
            train=_open_split(path, meta, "train"),
            val=_open_split(path, meta, "val"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / META} is damaged ({type(error).__name__}: {error}): {_AGAIN}") from None


def read_meta(path: Path) -> dict[str, Any]:
    """The content of meta.json. Raises DataError where there is none that this version reads."""
    try:
        meta = json.loads((path / META).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not path.exists():
            made = shlex.quote(str(path))
            raise NotWholeError(
                f"no prepared data in {path}: run python -m distgpt.prepare --input ... --output {made}"
            ) from None
        raise NotWholeError(f"{path} is not a dataset, it has no {META}: {_what_to_take(path)}") from None
    except OSError as error:
        raise DataError(f"cannot read {path / META}: {error.strerror}") from None
    except ValueError as error:
        raise NotWholeError(f"{path / META} is damaged ({error}): {_AGAIN}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{path / META} was not written by distgpt.prepare")
    if meta.get("version") != VERSION:
        raise DataError(f"{path} has dataset format version {meta.get('version')}, this distgpt reads {VERSION}")
    return meta


def _what_to_take(path: Path) -> str:
    """The dataset that may be meant by a directory or file that is none, or the command that makes one of it."""
    try:
        inside = list(itertools.islice(path.iterdir(), 1000))
    except OSError:  # a file, or a directory that is not to be listed
        inside = [path]
    if datasets := sorted(child for child in inside if os.path.isfile(child / META)):
        return f"did you mean {datasets[0]}?"
    name = path.resolve().stem if path.is_file() else path.resolve().name
    outputs = (Path("data", name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    made = shlex.quote(str(next(output for output in outputs if not os.path.lexists(output))))
    text = shlex.quote(str(path)) if inside else "..."
    return f"run python -m distgpt.prepare --input {text} --output {made}, then give {made} as the data"


def verify_dataset(dataset: Dataset, *, always: bool = False) -> None:
    """Check the SHA-256 of every file, that every token is below vocab_size, and that this is the tokenizer's.

    Raises DataError naming the file.

    Success is remembered in DIR/.verified.json by name, size and time of change, so that only the first use pays; a
    read-only directory pays every time. `always` checks again.
    """
    stamps = _stamps(dataset)
    if not always and _remembered(dataset.path) == stamps:
        return
    file = dataset.path / TOKENIZER
    _compare(file, _hash(file), dataset.meta["tokenizer"]["sha256"])
    tokenizer = load_tokenizer(file)
    if dataset.vocab_size != tokenizer.vocab_size or dataset.eot_id not in (None, tokenizer.eot_id):
        raise DataError(f"{dataset.path / META} is damaged (its vocabulary is not the tokenizer's): {_AGAIN}")
    for shard in shards_of(dataset.meta):
        _verify_tokens(dataset.path / shard.file, shard.sha256, dataset.vocab_size)
        _compare(dataset.path / shard.index, _hash(dataset.path / shard.index), shard.index_sha256)
    _remember(dataset.path, stamps)


def shards_of(meta: Mapping[str, Any], names: Sequence[SplitName] = SPLITS) -> list[Shard]:
    """The shards of these splits, in order."""
    return [Shard(**shard) for name in names for shard in meta["splits"][name]]


def file_names(meta: Mapping[str, Any]) -> list[str]:
    """Every file of the dataset."""
    return [TOKENIZER, META, *(name for shard in shards_of(meta) for name in (shard.file, shard.index))]


def is_dataset_file(name: str) -> bool:
    """Whether a file of this name may lie in a dataset's directory, whole or not."""
    return re.fullmatch(_DATASET_FILE, name) is not None


_DATASET_FILE = (
    r"(train|val)(-\d{5,})?\.bin|(train|val)-\d{5,}\.idx"
    r"|(tokenizer\.json|meta\.json|meta\.pkl|\.verified\.json)(\.\d+\.tmp)?"
)


@dataclass(frozen=True)
class Documents:
    """Consecutive tokens of one split. `ends`: the offsets in `tokens` at which a document ends, ascending.

    Tokens after the last end belong to a document that goes on in the next Documents of the split.
    """

    split: SplitName
    tokens: npt.NDArray[np.uint16]
    ends: npt.NDArray[np.int64]


def write_dataset(
    directory: Path,
    documents: Iterable[Documents],
    *,
    tokenizer: Tokenizer,
    eot_id: int | None,
    shard_tokens: int | None,
    about: Mapping[str, Any],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Write a dataset into an empty directory, all of it on disk when this returns; gives its meta.json.

    A shard ends with the document that fills `shard_tokens`. `about` goes into meta.json as it is; `advance` is told
    the bytes written. Raises OSError.
    """
    token_bytes = tokenizer.token_bytes()
    writers = {name: _SplitWriter(directory, name, token_bytes, shard_tokens) for name in SPLITS}
    try:
        for batch in documents:
            writers[batch.split].append(batch.tokens, batch.ends)
            advance(batch.tokens.nbytes)
        shards = {name: [asdict(shard) for shard in writer.finish()] for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()
    tokenizer_json = tokenizer.to_json().encode()
    write_file(directory / TOKENIZER, tokenizer_json)
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": "uint16",
        "vocab_size": tokenizer.vocab_size,
        "eot_id": eot_id,
        "tokenizer": {"kind": tokenizer.kind, "sha256": hashlib.sha256(tokenizer_json).hexdigest()},
        "splits": shards,
        **about,
    }
    if all(len(shards[name]) == 1 for name in SPLITS):
        _add_for_nanogpt(directory, tokenizer)
    sync(directory)
    write_file(directory / META, (json.dumps(meta, indent=2) + "\n").encode())
    return meta


def _add_for_nanogpt(directory: Path, tokenizer: Tokenizer) -> None:
    """Add the names under which nanoGPT's train.py and sample.py look for tokens and vocabulary. Raises OSError."""
    with contextlib.suppress(OSError):  # not every file system has hard links
        for name in SPLITS:
            os.link(directory / f"{name}-00000.bin", directory / f"{name}.bin")
    texts = [tokenizer.decode([id_]) for id_ in range(tokenizer.vocab_size)]
    ids = {text: id_ for id_, text in reversed(list(enumerate(texts)))}
    content = {"vocab_size": tokenizer.vocab_size, "itos": dict(enumerate(texts)), "stoi": ids}
    write_file(directory / "meta.pkl", pickle.dumps(content, protocol=4))


_AGAIN = "prepare it again with --overwrite"
_FEWER = "; raise ulimit -n, or prepare it again in fewer shards, with a larger --shard-tokens"


class _SplitWriter:
    """Writes one split, starting a new shard after the document that fills one."""

    def __init__(
        self, directory: Path, name: SplitName, token_bytes: npt.NDArray[np.int64], shard_tokens: int | None
    ) -> None:
        self._directory, self._name = directory, name
        self._token_bytes = token_bytes
        self._shard_tokens = shard_tokens
        self._finished: list[Shard] = []
        self._shard: _ShardWriter | None = None

    def append(self, tokens: npt.NDArray[np.uint16], ends: npt.NDArray[np.int64]) -> None:
        while tokens.size:
            if self._shard is None:
                self._shard = _ShardWriter(self._directory / f"{self._name}-{len(self._finished):05d}")
            count = self._documents_until_full(ends)
            full = count is not None
            stop = int(ends[count - 1]) if count is not None else tokens.size
            taken = ends[:count]
            self._shard.append(tokens[:stop], taken, int(self._token_bytes[tokens[:stop]].sum()))
            tokens, ends = tokens[stop:], ends[len(taken) :] - stop
            if full:
                self._end_shard()

    def finish(self) -> list[Shard]:
        self._end_shard()
        return self._finished

    def close(self) -> None:
        if self._shard is not None:
            self._shard.close()

    def _documents_until_full(self, ends: npt.NDArray[np.int64]) -> int | None:
        """How many of these documents the open shard takes to be full; None: it is not full after all of them."""
        if self._shard_tokens is None or self._shard is None:
            return None
        first = int(np.searchsorted(ends, self._shard_tokens - self._shard.tokens))
        return first + 1 if first < ends.size else None

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._finished.append(self._shard.finish())
            self._shard = None


class _ShardWriter:
    """Writes one .bin and its .idx, hashing on the way."""

    def __init__(self, stem: Path) -> None:
        self._bin = _HashedFile(stem.with_suffix(".bin"))
        self._idx = _HashedFile(stem.with_suffix(".idx"))
        self._idx.write(np.zeros(1, dtype="<u8"))
        self.tokens = self._documents = self._bytes = 0

    def append(self, tokens: npt.NDArray[np.uint16], ends: npt.NDArray[np.int64], text_bytes: int) -> None:
        self._bin.write(tokens.astype(DTYPE, copy=False))
        self._idx.write((ends + self.tokens).astype("<u8"))
        self.tokens += tokens.size
        self._documents += ends.size
        self._bytes += text_bytes

    def finish(self) -> Shard:
        return Shard(
            file=self._bin.path.name,
            tokens=self.tokens,
            documents=self._documents,
            bytes=self._bytes,
            sha256=self._bin.finish(),
            index=self._idx.path.name,
            index_sha256=self._idx.finish(),
        )

    def close(self) -> None:
        self._bin.close()
        self._idx.close()


class _HashedFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by finish or close)
        self._digest = hashlib.sha256()

    def write(self, array: npt.NDArray[Any]) -> None:
        raw = np.ascontiguousarray(array).data
        self._file.write(raw)
        self._digest.update(raw)

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def _check_files(path: Path, meta: Mapping[str, Any]) -> None:
    if meta["dtype"] != "uint16":
        raise DataError(f"{path} holds {meta['dtype']} tokens, this distgpt reads uint16")
    if not (path / TOKENIZER).is_file():
        raise DataError(f"{path / TOKENIZER} is missing: {_AGAIN}")
    for name in SPLITS:
        if not meta["splits"][name]:
            raise DataError(f"{path / META} is damaged (no {name} split): {_AGAIN}")
    for shard in shards_of(meta):
        _check_size(path / shard.file, shard.tokens * DTYPE.itemsize)
        _check_size(path / shard.index, (shard.documents + 1) * 8)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {_AGAIN}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if found < expected:
        raise DataError(f"{path} is cut short: {found:,} bytes instead of {expected:,}; {_AGAIN}")
    if found > expected:
        raise DataError(f"{path} is too long: {found:,} bytes instead of {expected:,}; {_AGAIN}")


def _allow_open_files() -> None:
    """Raise this process's limit of open files as far as it may itself: each memory map keeps one open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open_split(path: Path, meta: Mapping[str, Any], name: SplitName) -> Split:
    return Split(name, tuple(_map(path / shard.file) for shard in shards_of(meta, [name])))


def _map(path: Path) -> np.memmap[Any, np.dtype[np.uint16]]:
    try:
        tokens: np.memmap[Any, np.dtype[np.uint16]] = np.memmap(path, dtype=DTYPE, mode="r")
    except OSError as error:
        fix = _FEWER if error.errno == errno.EMFILE else ""
        raise DataError(f"cannot read {path}: {error.strerror}{fix}") from None
    memory = getattr(tokens, "_mmap", None)
    if memory is not None and hasattr(mmap, "MADV_RANDOM"):
        # Windows are read at random: read-ahead would fetch a hundred bytes for each one that is used.
        memory.madvise(mmap.MADV_RANDOM)
    return tokens


def _fingerprint(meta: Mapping[str, Any]) -> str:
    parts = [meta["tokenizer"]["sha256"], str(meta["vocab_size"]), str(meta["eot_id"])]
    parts += [f"{shard.file} {shard.sha256} {shard.index_sha256}" for shard in shards_of(meta)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _verify_tokens(path: Path, sha256: str, vocab_size: int) -> None:
    digest = hashlib.sha256()
    position = 0
    for chunk in _chunks(path):
        digest.update(chunk)
        tokens = np.frombuffer(chunk, dtype=DTYPE)
        if tokens.max() >= vocab_size:
            first = int(np.argmax(tokens >= vocab_size))
            raise DataError(
                f"{path} is damaged: token {position + first:,} is {tokens[first]}, outside the vocabulary of "
                f"{vocab_size:,}; {_AGAIN}"
            )
        position += tokens.size
    _compare(path, digest.hexdigest(), sha256)


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(f"{path} is damaged: its SHA-256 is {found[:16]}..., not {expected[:16]}...; {_AGAIN}")


def _stamps(dataset: Dataset) -> dict[str, list[int]]:
    """Size and time of change in nanoseconds of every file."""
    stats = {name: (dataset.path / name).stat() for name in file_names(dataset.meta)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _remembered(path: Path) -> object:
    try:
        return json.loads((path / VERIFIED).read_bytes())
    except (OSError, ValueError):
        return None


def _remember(path: Path, stamps: Mapping[str, list[int]]) -> None:
    with contextlib.suppress(OSError):
        write_file(path / VERIFIED, json.dumps(stamps).encode())
