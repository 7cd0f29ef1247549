"""The directory beside an output in which it is prepared: locked, kept for going on, committed by one rename.

<output>.partial/job.json      what is being prepared; parts of anything else are stale
<output>.partial/parts/        finished parts
<output>.partial/dataset/      the dataset, until it gets the output's name
"""

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distgpt.errors import DataError, DirectoryError
from distgpt.files import sync, write_file

STDIN_NAME = "stdin"
LOCK_NAME = "lock"
JOB_NAME = "job.json"


class CommittedError(DirectoryError):
    """The output was not there before; by now it is."""


def directory_of(output: Path) -> Path:
    """Where `output` is prepared."""
    return output.with_name(f"{output.name}.partial")


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """The staging directory of `output`, held by this process alone.

    Removed at the end unless it holds what another start can go on from, which nothing is once the data proved bad.
    Raises DirectoryError where another process has it or it cannot be made.
    """
    directory = directory_of(output)
    lock = _lock(directory, output)
    try:
        yield directory
    except DataError:
        clear(directory)
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
    output: Path, job: Mapping[str, Any], set_up: Callable[[Path], None], is_set_up: Callable[[Path], bool]
) -> Iterator[Path]:
    """The staging directory of `output`, held together with other processes that do a part of the same job each.

    Whoever has it alone sets it up, which does no harm a second time; if that is interrupted, another one does. Then
    all may write parts, and none commit. Raises CommittedError where another process has committed, DirectoryError
    where something else is prepared in it or it cannot be made.
    """
    directory = directory_of(output)
    while True:
        with suppress(DirectoryError), staging(output):
            # The parts of another job may be those of tasks that are to come.
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
            if found is not None and is_set_up(directory):
                yield directory
                return
        finally:
            os.close(lock)


def begin(directory: Path, job: Mapping[str, Any]) -> None:
    """Make the staging directory that of this job; what an interrupted run of the same job left stays.

    Raises OSError.
    """
    same = _job_of(directory) == job
    (directory / JOB_NAME).unlink(missing_ok=True)
    for entry in directory.iterdir():
        if entry.is_dir() and not (same and entry.name == "parts"):
            shutil.rmtree(entry)
        elif not entry.is_dir() and not same and entry.name not in (STDIN_NAME, LOCK_NAME):
            entry.unlink()
    for name in ("parts", "dataset"):
        (directory / name).mkdir(exist_ok=True)
    write_file(directory / JOB_NAME, json.dumps(job).encode())


def commit(directory: Path, output: Path) -> None:
    """Give the dataset its name, in place of an older one where there is one, and clean up. Raises OSError."""
    staged = directory / "dataset"
    if not output.exists():
        os.rename(staged, output)
    elif not exchanged(staged, output):
        # Where two names cannot be exchanged, a kill between these two lines leaves the old one to `recover`.
        os.rename(output, directory / "replaced")
        os.rename(staged, output)
    sync(output.parent)
    clear(directory)


def clear(directory: Path) -> None:
    """Remove everything but the lock from a staging directory. Raises OSError."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK_NAME:
            entry.unlink()


def clear_leftovers(output: Path, job: Mapping[str, Any]) -> None:
    """Remove the staging directory of a job whose dataset is committed; another process that has it does too.

    Raises OSError.
    """
    if _job_of(directory_of(output)) == job:
        with suppress(DirectoryError), staging(output) as directory:
            clear(directory)


def recover(output: Path) -> None:
    """Undo a replacement that a kill cut in two. Raises OSError."""
    replaced = directory_of(output) / "replaced"
    if replaced.exists() and not output.exists():
        os.rename(replaced, output)


def _job_of(directory: Path) -> object:
    try:
        return json.loads((directory / JOB_NAME).read_bytes())
    except (OSError, ValueError):
        return None


def _lock(directory: Path, output: Path, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    """The descriptor that holds the lock, until it is closed."""
    path = directory / LOCK_NAME
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(output, error) from None
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last owner just removed the directory
        except OSError as error:
            raise _cannot_write(output, error) from None
        try:
            fcntl.flock(descriptor, kind)
        except BlockingIOError:
            os.close(descriptor)
            raise DirectoryError(f"another process is preparing {output}: wait for it, or stop it") from None
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)  # its last owner removed it between our open and our lock


def _cannot_write(output: Path, error: OSError) -> DirectoryError:
    return DirectoryError(f"cannot write {output}: {error.strerror}: {error.filename}")


def exchanged(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux); False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0
