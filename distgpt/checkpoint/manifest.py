"""The files of a checkpoint, and the checks that it is whole.

checkpoints/step-00001000/     gets this name when it is whole
    __0_0.distcp ...           tensors, sharded (torch.distributed.checkpoint), one file a rank
    .metadata                  DCP's index of them (a pickle, but never unpickled: index.py)
    train.json                 step, validation loss, config, data fingerprint: see RunState
    tokenizer.json             a copy, so that sampling needs nothing else
    manifest.json              size and SHA-256 of each file above, where they come from (see Origin), its own SHA-256
"""

import errno
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from distgpt.config import check, from_dict
from distgpt.errors import DataError, StorageError, UsageError

FORMAT_VERSION = 2
FORMAT_WITHOUT_ORIGIN = 1
# Errors of file systems for a bad sector, a wrong checksum and a damaged inode.
BAD_DISK = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
MANIFEST, STATE, TOKENIZER, INDEX = "manifest.json", "train.json", "tokenizer.json", ".metadata"
CHECKPOINT_NAME = re.compile(r"step-\d{8}|step-[1-9]\d{8,29}")
MAX_JSON_BYTES = 2**26  # manifest.json has about 150 bytes for each rank
MAX_NUMBER, MAX_VOCABULARY = 2**50, 2**31  # no step, count or loss of a run is larger


@dataclass(frozen=True)
class RunState:
    """The content of train.json: what a checkpoint holds besides its tensors."""

    step: int
    val_loss: float | None
    config: dict[str, Any]
    data_fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int | None
    micro_batch: int = 0  # sequences per forward; old checkpoints lack it and the keys below
    guard: dict[str, Any] = field(default_factory=dict)  # state of the OutlierFilter; old checkpoints have this key
    replicas: int = 1  # Plan.independent_replicas
    dtype: Literal["", "float32", "bfloat16"] = ""  # of matrix products, as train.dtype names it


@dataclass(frozen=True)
class Link:
    """A checkpoint, and the SHA-256 of its manifest.json, which stands for all that it holds."""

    step: int
    sha256: str


@dataclass(frozen=True)
class Origin:
    """A statement in a manifest of what the checkpoint was made from, and how. Old checkpoints have none."""

    previous: Link | None  # the checkpoint before it in its run, by which the checkpoints of a run form a chain
    config: str  # SHA-256 of the config in train.json
    data: str  # the fingerprint of the data
    code: str  # SHA-256 of the files of distgpt
    version: str  # of distgpt and torch
    device: str
    layout: str  # over the ranks


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return directory / f"step-{step:08d}"


def committed(directory: Path) -> list[Path]:
    """List the committed checkpoints in a run's directory of checkpoints, newest first."""
    named = [d for d in directory.glob("step-*") if CHECKPOINT_NAME.fullmatch(d.name)]
    return sorted(filter(Path.is_dir, named), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint. Raises DataError if it has none."""
    if not CHECKPOINT_NAME.fullmatch(checkpoint.name):
        raise DataError(f"{checkpoint} has no step in its name: give it its original name, such as step-00001000")
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Read the size and SHA-256 of each other file of a checkpoint, by name. Raises DataError if it is damaged.

    Raises StorageError if it cannot be read now but may be whole.
    """
    return _read_manifest(checkpoint)[0]


def read_origin(checkpoint: Path) -> Origin | None:
    """Read the origin of a checkpoint, None if it is too old to state it. Raises DataError or StorageError."""
    return _read_manifest(checkpoint)[1]


def _read_manifest(checkpoint: Path) -> tuple[dict[str, dict[str, Any]], Origin | None]:
    with _damage_as_data_error(checkpoint / MANIFEST):
        content = read_file(checkpoint / MANIFEST, MAX_JSON_BYTES)
        stated = json.loads(content)
        files: dict[str, dict[str, Any]] = stated["files"]
        origin = _origin_from_json(**stated["origin"]) if "origin" in stated else None
        if manifest_bytes(files, origin) != content:
            raise DataError(f"{MANIFEST} is damaged")
        for name, entry in files.items():
            if not is_checkpoint_file(name) or name == MANIFEST:
                raise DataError(f"{MANIFEST} names {name[:100]!r}, which a checkpoint does not have")
            if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
                raise DataError(f"{MANIFEST} has no size and hash of {name}")
    return files, origin


def _origin_from_json(previous: dict[str, Any] | None, **texts: str) -> Origin:
    """Return an origin. Raises TypeError or ValueError if it is not one."""
    link = None if previous is None else Link(**previous)
    if not all(isinstance(text, str) for text in (*texts.values(), "" if link is None else link.sha256)):
        raise TypeError("its origin holds what is not text")
    if link is not None and not (type(link.step) is int and 0 <= link.step <= MAX_NUMBER):
        raise ValueError(f"it follows step {str(link.step)[:30]}")
    return Origin(link, **texts)


@contextmanager
def _damage_as_data_error(file: Path) -> Iterator[None]:
    """Raise DataError for any error in the content of a file, StorageError if the content may be whole."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{file.name} is missing") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {_describe_error(file, error)}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)[:200]}") from None


def find_damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """List what is wrong with this rank's share of the files of a checkpoint.

    Raises StorageError if a file cannot be read now but may be whole.
    """
    try:
        files = read_manifest(checkpoint)
    except DataError as error:
        return [str(error)]
    problems = [f"{MANIFEST} does not list {name}" for name in (INDEX, STATE, TOKENIZER) if name not in files]
    for name in sorted(files)[rank::world_size]:
        try:
            size = file_size(checkpoint / name)
            if size != files[name]["bytes"]:
                problems.append(f"{name} has {size} bytes, not {files[name]['bytes']}")
            elif sha256_of(checkpoint / name) != files[name]["sha256"]:
                problems.append(f"{name} does not match its hash")
            elif name == STATE:
                read_state(checkpoint)
        except OSError as error:
            problems.append(f"{name}: {_describe_error(checkpoint / name, error)}")
        except DataError as error:
            problems.append(str(error))
    return problems


def _describe_error(file: Path, error: OSError) -> str:
    """Describe the damage that an error shows. Raises StorageError if the file may be whole: a server may be down."""
    if isinstance(error, NotAFileError | FileNotFoundError) or error.errno in BAD_DISK:
        return str(error.strerror)
    raise StorageError(f"cannot read {file}: {error.strerror}") from None


def is_checkpoint_file(name: str) -> bool:
    """Tell whether a checkpoint can have a file of this name."""
    return re.fullmatch(r"__\d+_\d+\.distcp|\.metadata|(train|tokenizer|manifest)\.json", name) is not None


def read_state(checkpoint: Path) -> RunState:
    """Read train.json. Raises StorageError if it cannot be read now but may be whole.

    Raises DataError unless it matches the manifest and the step in the name of its directory, and is valid.
    """
    file = checkpoint / STATE
    with _damage_as_data_error(file):
        content = read_file(file, MAX_JSON_BYTES)
        if hashlib.sha256(content).hexdigest() != read_manifest(checkpoint)[STATE]["sha256"]:
            raise DataError(f"{file} does not match its hash")
        state = RunState(**json.loads(content))
        _require_valid(state, file)
    if state.step != step_of(checkpoint):
        raise DataError(f"{file} is of step {state.step}, and its directory has the name {checkpoint.name}")
    return state


def _require_valid(state: RunState, file: Path) -> None:
    """Raise DataError if a field has a wrong type, or a number that no run has."""
    kinds = get_type_hints(RunState) | {"val_loss": int | float | None, "config": dict, "guard": dict, "dtype": str}
    for name, value in vars(state).items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise DataError(f"{file} is not valid: its {name} is a {type(value).__name__}")
    limits = {
        "step": (0, MAX_NUMBER),
        "vocab_size": (1, MAX_VOCABULARY),
        "eot_id": (0, state.vocab_size - 1),
        "micro_batch": (0, MAX_NUMBER),
        "replicas": (1, MAX_NUMBER),
    }
    for name, (least, most) in limits.items():
        value = getattr(state, name)
        if value is not None and not least <= value <= most:
            raise DataError(f"{file} is not valid: its {name} is {str(value)[:30]}")
    if state.dtype not in ("", "float32", "bfloat16"):
        raise DataError(f"{file} is not valid: its dtype is {str(state.dtype)[:30]!r}")
    _require_numbers(state, file)
    try:
        check(from_dict(state.config, source=str(file)))
    except UsageError as error:
        raise DataError(f"{file} is not valid: {error}") from None


def _require_numbers(state: RunState, file: Path) -> None:
    """Raise DataError unless the validation loss and the state of the outlier filter (`guard`) hold numbers."""
    figures: list[Any] = [0 if state.val_loss is None else state.val_loss]
    for name in ("losses", "grad_norms"):
        values = state.guard.get(name, [])
        figures += values if isinstance(values, list) else [values]
    skips = state.guard.get("skips", 0)
    if not all(type(figure) is float or (type(figure) is int and abs(figure) < MAX_NUMBER) for figure in figures):
        raise DataError(f"{file} is not valid: a loss or a gradient norm in it is not a number")
    if type(skips) is not int or not 0 <= skips < MAX_NUMBER:
        raise DataError(f"{file} is not valid: its guard.skips is {str(skips)[:30]}")


def manifest_bytes(files: dict[str, dict[str, Any]], origin: Origin | None) -> bytes:
    """Return the content of manifest.json, with a hash of itself, so that a flipped bit in it is noticed."""
    body: dict[str, Any] = {"format_version": FORMAT_WITHOUT_ORIGIN, "files": files}
    if origin is not None:
        body |= {"format_version": FORMAT_VERSION, "origin": asdict(origin)}
    own_hash = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": own_hash}, sort_keys=True, indent=1).encode()


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError, and NotAFileError if it is not a regular file."""
    with open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class NotAFileError(OSError):
    """A directory, link, pipe or device where a regular file should be."""


def open_file(file: Path) -> io.BufferedReader:
    """Open a file of a checkpoint to read. Raises OSError, and NotAFileError if it is not a regular file."""
    file_size(file)
    # These flags keep open() from blocking if a pipe has replaced the file since.
    safe = os.O_NONBLOCK | os.O_NOFOLLOW
    # io.open: tests replace it to inject faults.
    return io.open(file, "rb", opener=lambda path, flags: os.open(path, flags | safe))  # noqa: UP020


def file_size(file: Path) -> int:
    """Return the size of a file in bytes. Raises OSError, and NotAFileError if it is not a regular file."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise NotAFileError(errno.EINVAL, "it is a link" if stat.S_ISLNK(status.st_mode) else "it is not a file")
    return status.st_size


def read_file(file: Path, max_bytes: int) -> bytes:
    """Read a file of at most `max_bytes`. Raises OSError, and DataError if it is larger."""
    with open_file(file) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(f"{file} is larger than {max_bytes // 2**20} MiB, the largest size that it can have")
    return content


def describe_damage(damaged: dict[str, str]) -> str:
    """List the damaged checkpoints and the damage of each, in one line."""
    return "; ".join(f"{name}: {why}" for name, why in damaged.items())


def one_line(error: BaseException) -> str:
    """Return the message of an exception, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__
