"""A dataset: a prepared directory of tokens, hashed, opened as memory maps, verified before it is used.

train-00000.bin  val-00000.bin      raw little-endian tokens, no header: uint16, or uint32 for more than 65,536 ids
train-00000.idx  val-00000.idx      uint64, documents + 1 token offsets into the .bin of the same name
tokenizer.json   meta.json          meta.json is written last: a directory without it is not a dataset
train.bin  val.bin  meta.pkl        for nanoGPT, if a split is one shard: links and a pickle that nothing here reads
"""

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import re
import resource
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.corpus.tokenizer.loading import FILE_NAME as TOKENIZER
from distgpt.errors import DataError, did_you_mean_path
from distgpt.files import write_file

META = "meta.json"
VERIFIED = ".verified.json"
FORMAT = "distgpt-dataset"
VERSION = 1
CHUNK_BYTES = 2**22

TokenMap = np.memmap[Any, np.dtype[np.unsignedinteger[Any]]]
Dtype = np.dtype[np.unsignedinteger[Any]]
DTYPES: dict[str, Dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = ("train", "val")

_DATASET_FILE = (
    r"(train|val)(-\d{5,})?\.bin|(train|val)-\d{5,}\.idx"
    r"|(tokenizer\.json|meta\.json|meta\.pkl|\.verified\.json)(\.\d+\.tmp)?"
)
_PREPARE_AGAIN = "prepare it again with --overwrite"
_TOO_MANY_SHARDS = "; raise ulimit -n, or prepare it again in fewer shards, with a larger --shard-tokens"


class IncompleteError(DataError):
    """A directory without a dataset, or with a part of one: overwriting it loses nothing."""


@dataclass(frozen=True)
class Shard:
    """The entry of one .bin and its .idx in meta.json. `bytes`: UTF-8 bytes of the text that the tokens encode."""

    file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str


@dataclass(frozen=True)
class Part:
    """The part of a split that one dataset gives: the lengths of its shards, in tokens; its share of the sequences."""

    name: str
    split: str  # for messages
    lengths: tuple[int, ...]
    share: float = 1.0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Split:
    """The tokens of one split: one (tokens,) memory map per shard, uint16 or uint32.

    `mix`: the datasets whose shards these are, in order, if there are several.
    """

    name: str
    shards: tuple[TokenMap, ...]
    mix: tuple[Part, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The datasets of the split, be it one or several."""
        return self.mix or (Part("", f"{self.name} split", tuple(map(len, self.shards))),)


@dataclass(frozen=True)
class Dataset:
    """A prepared directory, or a mix of several.

    `fingerprint` identifies its tokens and tokenizer, wherever the directory lies. `mixed`: the datasets of a mix.
    The mix has `path` and `meta` of the first.
    """

    path: Path
    meta: dict[str, Any]
    vocab_size: int
    eot_id: int | None
    fingerprint: str
    train: Split
    val: Split
    mixed: tuple["Dataset", ...] = ()

    def __str__(self) -> str:
        shares = zip(self.mixed, self.train.mix, strict=True)
        return ",".join(f"{dataset.path}:{part.share:.3g}" for dataset, part in shares) or str(self.path)


def open_dataset(path: Path) -> Dataset:
    """Memory-map a prepared directory after checking that it is whole: meta.json, format, file sizes.

    Raises DataError if a file is missing or cut short, or it is not a dataset. `verify_dataset` checks the hashes.
    """
    meta = read_meta(path)
    _allow_open_files()
    try:
        _check_files(path, meta)
        train, val = (
            Split(name, tuple(_map(path / s.file, DTYPES[meta["dtype"]]) for s in shards_of(meta, name)))
            for name in SPLITS
        )
        return Dataset(
            path=path,
            meta=meta,
            vocab_size=int(meta["vocab_size"]),
            eot_id=None if meta["eot_id"] is None else int(meta["eot_id"]),
            fingerprint=_fingerprint(meta),
            train=train,
            val=val,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / META} is damaged ({type(error).__name__}: {error}): {_PREPARE_AGAIN}") from None


def read_meta(path: Path) -> dict[str, Any]:
    """Return the content of meta.json. Raises DataError if there is none that this version reads."""
    try:
        meta = json.loads((path / META).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not path.exists():
            command = f"python -m distgpt.prepare --input ... --output {shlex.quote(str(path))}"
            raise IncompleteError(f"no prepared data in {path}: run {command}") from None
        raise IncompleteError(f"{path} is not a dataset, it has no {META}: {_advice(path)}") from None
    except OSError as error:
        raise DataError(f"cannot read {path / META}: {error.strerror}") from None
    except ValueError as error:
        raise IncompleteError(f"{path / META} is damaged ({error}): {_PREPARE_AGAIN}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{path / META} was not written by distgpt.prepare")
    if meta.get("version") != VERSION:
        raise DataError(f"{path} has dataset format version {meta.get('version')}, this distgpt reads {VERSION}")
    return meta


def verify_dataset(dataset: Dataset, *, always: bool = False) -> None:
    """Check the SHA-256 of every file, that every token is below vocab_size, and that the tokenizer agrees.

    Raises DataError naming the file.

    DIR/.verified.json keeps the size and modification time of verified files, so that only the first use takes
    time; a read-only directory is verified at every use. `always`: verify again.
    """
    for part in dataset.mixed:
        verify_dataset(part, always=always)
    if dataset.mixed:
        return
    stamps = _stamps(dataset)
    with contextlib.suppress(OSError, ValueError):
        if not always and json.loads((dataset.path / VERIFIED).read_bytes()) == stamps:
            return
    _verify_file(dataset.path / TOKENIZER, dataset.meta["tokenizer"]["sha256"])
    tokenizer = load_tokenizer(dataset.path / TOKENIZER)
    if dataset.vocab_size != tokenizer.vocab_size or dataset.eot_id not in (None, tokenizer.eot_id):
        raise DataError(f"{dataset.path / META} is damaged (its vocabulary is not the tokenizer's): {_PREPARE_AGAIN}")
    for shard in shards_of(dataset.meta):
        dtype = DTYPES[dataset.meta["dtype"]]
        _verify_file(dataset.path / shard.file, shard.sha256, vocab_size=dataset.vocab_size, dtype=dtype)
        _verify_file(dataset.path / shard.index, shard.index_sha256)
    with contextlib.suppress(OSError):
        write_file(dataset.path / VERIFIED, json.dumps(stamps).encode())


def shards_of(meta: Mapping[str, Any], *names: SplitName) -> list[Shard]:
    """Return the shards of these splits, or of all, in order."""
    return [Shard(**shard) for name in names or SPLITS for shard in meta["splits"][name]]


def mapping_of(tokens: TokenMap) -> mmap.mmap:
    """Return the memory map behind the tokens of a shard."""
    assert isinstance(tokens.base, mmap.mmap)
    return tokens.base


def is_dataset_file(name: str) -> bool:
    """Return True if a file of this name may be in the directory of a dataset, whole or not."""
    return re.fullmatch(_DATASET_FILE, name) is not None


def _advice(path: Path) -> str:
    """Return advice for a path that is no dataset: one inside it, or the command that prepares one from it."""
    try:
        inside = list(itertools.islice(path.iterdir(), 1000))
    except OSError:  # a file, or a directory that cannot be listed
        inside = [path]
    if datasets := sorted(child for child in inside if os.path.isfile(child / META)):
        return f"did you mean {datasets[0]}?"
    if similar := did_you_mean_path(path):
        return similar.removeprefix("; ")
    name = path.resolve().stem if path.is_file() else path.resolve().name
    outputs = (Path("data", name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    made = shlex.quote(str(next(output for output in outputs if not os.path.lexists(output))))
    text = shlex.quote(str(path)) if inside else "..."
    return f"run python -m distgpt.prepare --input {text} --output {made}, then give {made} as the data"


def _check_files(path: Path, meta: Mapping[str, Any]) -> None:
    if meta["dtype"] not in DTYPES:
        raise DataError(f"{path} holds {meta['dtype']} tokens, this distgpt reads {' and '.join(DTYPES)}")
    if not (path / TOKENIZER).is_file():
        raise DataError(f"{path / TOKENIZER} is missing: {_PREPARE_AGAIN}")
    for name in SPLITS:
        if not meta["splits"][name]:
            raise DataError(f"{path / META} is damaged (no {name} split): {_PREPARE_AGAIN}")
    for shard in shards_of(meta):
        _check_size(path / shard.file, shard.tokens * DTYPES[meta["dtype"]].itemsize)
        _check_size(path / shard.index, (shard.documents + 1) * 8)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {_PREPARE_AGAIN}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if size != expected:
        problem = "cut short" if size < expected else "too long"
        raise DataError(f"{path} is {problem}: {size:,} bytes instead of {expected:,}; {_PREPARE_AGAIN}")


def _allow_open_files() -> None:
    """Raise this process's limit of open files as far as the system lets it: each memory map keeps one open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _map(path: Path, dtype: Dtype) -> TokenMap:
    try:
        tokens: TokenMap = np.memmap(path, dtype=dtype, mode="r")
    except OSError as error:
        fix = _TOO_MANY_SHARDS if error.errno == errno.EMFILE else ""
        raise DataError(f"cannot read {path}: {error.strerror}{fix}") from None
    # Windows are at random places: the kernel's read-ahead would fetch a hundred bytes for each byte used.
    mapping_of(tokens).madvise(mmap.MADV_RANDOM)
    return tokens


def _fingerprint(meta: Mapping[str, Any]) -> str:
    parts = [meta["tokenizer"]["sha256"], str(meta["vocab_size"]), str(meta["eot_id"])]
    parts += [f"{shard.file} {shard.sha256} {shard.index_sha256}" for shard in shards_of(meta)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _verify_file(path: Path, sha256: str, *, vocab_size: int | None = None, dtype: Dtype = DTYPES["uint16"]) -> None:
    """Check the SHA-256 of a file; with `vocab_size`, also that all its tokens are below it. Raises DataError."""
    digest = hashlib.sha256()
    position = 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                if vocab_size is not None:
                    tokens = np.frombuffer(chunk, dtype=dtype)
                    if tokens.max() >= vocab_size:
                        first = int(np.argmax(tokens >= vocab_size))
                        raise DataError(
                            f"{path} is damaged: token {position + first:,} is {tokens[first]}, outside the "
                            f"vocabulary of {vocab_size:,}; {_PREPARE_AGAIN}"
                        )
                    position += tokens.size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if (found := digest.hexdigest()) != sha256:
        raise DataError(f"{path} is damaged: its SHA-256 is {found[:16]}..., not {sha256[:16]}...; {_PREPARE_AGAIN}")


def _stamps(dataset: Dataset) -> dict[str, list[int]]:
    """Return the size of every file, and its modification time in nanoseconds."""
    names = [TOKENIZER, META, *(name for shard in shards_of(dataset.meta) for name in (shard.file, shard.index))]
    stats = {name: (dataset.path / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
