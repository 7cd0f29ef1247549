"""What a checkpoint is on disk, and whether it is whole.

checkpoints/step-00001000/     whole, or it would not have this name
    __0_0.distcp ...           tensors, sharded (torch.distributed.checkpoint), one file a rank
    .metadata                  DCP's index of them (a pickle, read through an allow-list: loading.py)
    train.json                 step, validation loss, config, data fingerprint: see RunState
    tokenizer.json             so that sampling needs nothing else
    manifest.json              size and SHA-256 of each file above, and of itself
"""

import errno
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distgpt.errors import DataError, StorageError

FORMAT_VERSION = 1
# What file systems say of a bad sector, a checksum that is wrong and an inode that makes no sense.
BAD_DISK = (errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))
MANIFEST, STATE, TOKENIZER = "manifest.json", "train.json", "tokenizer.json"


@dataclass(frozen=True)
class RunState:
    """What a checkpoint knows besides its tensors."""

    step: int
    val_loss: float | None
    config: dict[str, Any]
    data_fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int | None
    micro_batch: int = 0  # sequences per forward; 0 in checkpoints from before it was kept, as is what follows
    guard: dict[str, Any] = field(default_factory=dict)  # Guard.state()
    replicas: int = 1  # replicas_apart()


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}"


def committed(directory: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    found = [d for d in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", d.name) and d.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """By name, bytes and SHA-256 of a checkpoint's other files. Raises DataError unless its own hash is right.

    Raises StorageError if it cannot be read now, as damage() does.
    """
    try:
        content = (checkpoint / MANIFEST).read_bytes()
        files: dict[str, dict[str, Any]] = json.loads(content)["files"]
        if manifest_bytes(files) != content:
            raise DataError(f"{MANIFEST} is damaged")
    except FileNotFoundError:
        raise DataError(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise DataError(f"{MANIFEST} cannot be read ({_harm(checkpoint / MANIFEST, error)})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{MANIFEST} cannot be read ({one_line(error)})") from None
    return files


def damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with a checkpoint, as far as this rank's share of its files shows; empty if nothing is.

    Raises StorageError if a file cannot be read now for a reason that says nothing of what is in it.
    """
    try:
        files = read_manifest(checkpoint)
    except DataError as error:
        return [str(error)]
    problems = []
    for name in sorted(files)[rank::world_size]:
        try:
            size = (checkpoint / name).stat().st_size
            if size != files[name]["bytes"]:
                problems.append(f"{name} has {size} bytes, not {files[name]['bytes']}")
            elif sha256_of(checkpoint / name) != files[name]["sha256"]:
                problems.append(f"{name} does not match its hash")
        except OSError as error:
            problems.append(f"{name}: {_harm(checkpoint / name, error)}")
    return problems


def _harm(file: Path, error: OSError) -> str:
    """What has become of a file. Raises StorageError where it may be whole: a server is away, it is another user's."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) or error.errno in BAD_DISK:
        return str(error.strerror)
    raise StorageError(f"cannot read {file}: {error.strerror}") from None


def is_file_of_ours(name: str) -> bool:
    """Whether a file in a checkpoint, whole or not, has a name that we give."""
    return re.fullmatch(r"__\d+_\d+\.distcp|\.metadata|(train|tokenizer|manifest)\.json", name) is not None


def read_state(checkpoint: Path) -> RunState:
    """train.json of a checkpoint. Raises DataError unless it is as the manifest has it, StorageError as damage()."""
    file = checkpoint / STATE
    try:
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != read_manifest(checkpoint)[STATE]["sha256"]:
            raise DataError(f"{file} does not match its hash")
        return RunState(**json.loads(content))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {_harm(file, error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from None


def manifest_bytes(files: dict[str, dict[str, Any]]) -> bytes:
    """manifest.json: canonical, and with a hash of itself, so that a flipped bit in it shows too."""
    body = {"format_version": FORMAT_VERSION, "files": files}
    own_hash = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": own_hash}, sort_keys=True, indent=1).encode()


def sha256_of(file: Path) -> str:
    """Of a file's content, in hexadecimal. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def all_broken(broken: dict[str, str]) -> str:
    """What to say where each checkpoint, by name, has something wrong."""
    return f"holds no whole checkpoint ({listed(broken)})"


def listed(broken: dict[str, str]) -> str:
    """Checkpoints and what is wrong with each, in one line."""
    return "; ".join(f"{name}: {why}" for name, why in broken.items())


def one_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__
