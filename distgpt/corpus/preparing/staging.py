"""The directory beside an output in which it is prepared: locked, kept after a kill, committed by one rename.

<output>.partial/job.json      what the parts depend on; parts of another job are not used
<output>.partial/parts/        finished parts
<output>.partial/dataset/      the dataset, until it gets the output's name
<output>.partial/remote/       downloads of input files
"""

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from distgpt.errors import DataError, DirectoryError
from distgpt.files import sync, write_file

T = TypeVar("T")

STDIN_NAME = "stdin"
LOCK_NAME = "lock"
JOB_NAME = "job.json"
PARTS, DATASET, REPLACED, REMOTE = "parts", "dataset", "replaced", "remote"


class CommittedError(DirectoryError):
    """Another process has committed the output meanwhile."""


def directory_of(output: Path) -> Path:
    """Return the staging directory of `output`."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def exclusive(output: Path) -> Iterator[Path]:
    """Hold the staging directory of `output` with an exclusive lock.

    At the end it is removed, unless a later run can go on from its content. After bad data, only downloads are kept.
    Raises DirectoryError if another process holds it or it cannot be made.
    """
    directory = directory_of(output)
    lock = _lock(directory, output)
    try:
        yield directory
    except DataError:
        _remove(directory, {*os.listdir(directory)} - {LOCK_NAME, REMOTE})
        raise
    finally:
        (directory / STDIN_NAME).unlink(missing_ok=True)
        if os.listdir(directory) == [LOCK_NAME]:
            (directory / LOCK_NAME).unlink()
            with suppress(OSError):  # another process came in between
                directory.rmdir()
        os.close(lock)


@contextmanager
def shared(
    output: Path, job: Mapping[str, Any], set_up: Callable[[Path], object], load: Callable[[Path], T | None]
) -> Iterator[tuple[Path, T]]:
    """Hold the staging directory of `output` with a shared lock, beside other processes that share the same job.

    First one process calls `set_up` under an exclusive lock; if it is killed, another one does. A second call does no
    harm. Then each process gets the directory and what `load` returns for it. It may write parts, but not commit.
    Raises CommittedError if another process has committed, DirectoryError if the directory belongs to another job or
    cannot be made.
    """
    directory = directory_of(output)
    while True:
        with suppress(DirectoryError), exclusive(output):
            # The parts of another job may be needed by tasks of it that have not started yet.
            if not os.path.lexists(output) and _job_of(directory) in (None, job):
                begin(directory, job)
                set_up(directory)
        if os.path.lexists(output):
            raise CommittedError(f"another process has just prepared {output}")
        lock = _lock(directory, output, fcntl.LOCK_SH)
        try:
            found = _job_of(directory)
            if found not in (None, job):
                raise DirectoryError(f"{directory} is for another input or other options: finish that job or remove it")
            if found is not None and (loaded := load(directory)) is not None:
                yield directory, loaded
                return
        finally:
            os.close(lock)


def begin(directory: Path, job: Mapping[str, Any]) -> None:
    """Prepare the staging directory for this job, and keep the parts of an earlier run of it. Raises OSError."""
    same = _job_of(directory) == job
    (directory / JOB_NAME).unlink(missing_ok=True)
    _remove(directory, {DATASET, REPLACED} if same else {*os.listdir(directory)} - {STDIN_NAME, LOCK_NAME, REMOTE})
    for name in (PARTS, DATASET):
        (directory / name).mkdir(exist_ok=True)
    write_file(directory / JOB_NAME, json.dumps(job).encode())


def commit(directory: Path, output: Path) -> None:
    """Give the dataset its name, in place of an older one if there is one, and clean up. Raises OSError."""
    staged = directory / DATASET
    if not output.exists():
        os.rename(staged, output)
    elif not exchange(staged, output):
        # Without an atomic exchange, a kill between these two lines leaves the old dataset for `recover` to restore.
        os.rename(output, directory / REPLACED)
        os.rename(staged, output)
    sync(output.parent)
    clear(directory)


def clear_leftovers(output: Path, job: Mapping[str, Any]) -> None:
    """Remove the staging directory of a committed job. A process that holds it will do that itself. Raises OSError."""
    if _job_of(directory_of(output)) == job:
        with suppress(DirectoryError), exclusive(output) as directory:
            clear(directory)


def recover(output: Path) -> None:
    """Undo a replacement that was killed between its two renames. Raises OSError."""
    replaced = directory_of(output) / REPLACED
    if replaced.exists() and not output.exists():
        os.rename(replaced, output)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names atomically (Linux). Return False if the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange_flag = -100, 2
    names = at_cwd, os.fsencode(first), at_cwd, os.fsencode(second)
    return renameat2 is not None and renameat2(*names, exchange_flag) == 0


def clear(directory: Path) -> None:
    """Remove everything but the lock from a staging directory. Raises OSError."""
    _remove(directory, {*os.listdir(directory)} - {LOCK_NAME})


def _remove(directory: Path, names: Iterable[str]) -> None:
    for path in map(directory.joinpath, names):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _job_of(directory: Path) -> object:
    try:
        return json.loads((directory / JOB_NAME).read_bytes())
    except (OSError, ValueError):
        return None


def _lock(directory: Path, output: Path, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    """Return a descriptor that holds the lock until it is closed."""
    path = directory / LOCK_NAME
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(output, error) from None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the last process to hold the lock has just removed the directory
        except OSError as error:
            raise _cannot_write(output, error) from None
        try:
            fcntl.flock(descriptor, kind)
        except BlockingIOError:
            os.close(descriptor)
            raise DirectoryError(f"another process is preparing {output}: wait for it, or stop it") from None
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # the file was removed between our open and our lock


def _cannot_write(output: Path, error: OSError) -> DirectoryError:
    return DirectoryError(f"cannot write {output}: {error.strerror}: {error.filename}")
