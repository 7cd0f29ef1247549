"""The run directory: where its files are, who owns it, and how the run ended.

Imports no torch: a locked or read-only directory is found before anything heavy is loaded.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgpt.errors import DirectoryError, StorageError

EXIT_FILE_VARIABLE = "DISTGPT_EXIT_FILE"


@dataclass(frozen=True)
class RunPaths:
    """The names of everything in a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def goodput(self) -> Path:
        return self.root / "goodput.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def plot(self) -> Path:
        return self.root / "plots" / "loss.png"

    @property
    def exit_report(self) -> Path:
        return self.root / "exit.json"

    @property
    def lock(self) -> Path:
        return self.root / "LOCK"


class RunLock:
    """An exclusive flock on LOCK, held by rank 0 for as long as its process lives; the kernel drops it at any death.

    The file stays: removing it would let two jobs lock two files of one name.
    """

    def __init__(self, paths: RunPaths) -> None:
        """Create the directory and take the lock.

        Raises DirectoryError when another process holds it or the directory cannot be written, StorageError when
        the file system has no locks.
        """
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DirectoryError(
                f"cannot write to the run directory {paths.root}: {error.strerror}; choose another with --run.dir=DIR"
            ) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _owner(self._fd)
            os.close(self._fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DirectoryError(
                    f"the run directory {paths.root} is in use by {holder}; wait for it or choose another --run.dir"
                ) from None
            raise StorageError(f"cannot lock {paths.lock}: {error.strerror}; choose a --run.dir with locks") from None
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        try:
            paths.exit_report.unlink(missing_ok=True)  # how the last run ended says nothing of this one
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps(owner).encode(), 0)
        except OSError as error:
            raise StorageError(f"cannot write {paths.lock}: {error.strerror}") from None


def lock_holder(paths: RunPaths) -> str | None:
    """Who holds the lock of this run directory, None if nobody does. Changes nothing."""
    try:
        fd = os.open(paths.lock, os.O_RDWR)
    except OSError:
        return None  # there is none, or it cannot be opened: for RunLock to complain about
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return _owner(fd)
    finally:
        os.close(fd)
    return None


def write_exit_report(paths: RunPaths | None, *, code: int, cause: str, rank: int, step: int | None) -> bool:
    """Write exit.json, and a copy to $DISTGPT_EXIT_FILE where a launcher names one. The first cause stands.

    Returns whether this was the first report of the run directory (or, with no directory, of the launcher's file).
    """
    report = {
        "code": code,
        "cause": cause,
        "rank": rank,
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": _this_job(),
    }
    targets = [paths.exit_report] if paths else []
    if launcher_file := os.environ.get(EXIT_FILE_VARIABLE):
        targets.append(Path(launcher_file))
    answers = [_write_once(target, report) for target in reversed(targets)]
    # The run directory's counts most, but its disk may be full. A cause that no file can hold must still be told.
    return next((first for first in reversed(answers) if first is not None), True)


def forget_last_attempt() -> None:
    """Remove the launcher's copy of the report of an attempt that torchrun has started anew."""
    launcher_file = os.environ.get(EXIT_FILE_VARIABLE)
    if launcher_file and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        Path(launcher_file).unlink(missing_ok=True)


def code_of_this_job(paths: RunPaths) -> int | None:
    """The exit code that an earlier attempt of this same torchrun reported, None if it did not."""
    for file in (Path(os.environ.get(EXIT_FILE_VARIABLE, "")), paths.exit_report):
        with suppress(OSError, ValueError):
            report = json.loads(file.read_text())
            if isinstance(report, dict) and report.get("job") == _this_job():
                return int(report["code"])
    return None


def _this_job() -> str | None:
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _write_once(target: Path, report: dict[str, Any]) -> bool | None:
    """Whether `target` is now this report; False where one stood already, None where none can be written.

    A link is atomic and never replaces.
    """
    staged = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        staged.write_text(json.dumps(report) + "\n")
        os.link(staged, target)
    except FileExistsError:
        return False
    except OSError:
        return None
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return True


def _owner(fd: int) -> str:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return f"pid {owner['pid']} on {owner['host']} since {owner['started']}"
    except (ValueError, KeyError, OSError):
        return "another job"
