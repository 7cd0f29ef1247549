"""Paths that a user wrote, durable file writes, and /proc. Imports no torch."""

import errno
import os
import time
from pathlib import Path

from distgpt.errors import UsageError


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically and durably: under a temporary name, then fsync and rename. Raises OSError."""
    staged = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(staged, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(directory: Path) -> None:
    """Flush the entries of a directory to the disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_path(text: str) -> str:
    """Expand ~ in a path from a flag or a config file, since no shell has done so. Raises UsageError.

    A path with a $ is refused unless it exists: the user expects a variable to be expanded, and it is not.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise UsageError(f"no home directory is known for {text}: for a file of that name write ./{text}")
    if "$" in text and not os.path.lexists(path):
        raise UsageError(f"{text!r} holds a $, and variables are not expanded here: write the path itself")
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{path[:80]}... has {len(path)} characters, more than a path can have here") from None
    except ValueError:
        raise UsageError(f"{path!r} holds a NUL character, which no path can have") from None
    return path


def process_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that follow the program's name: state, parent and so on. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def parent_of(pid: int) -> int:
    """Return the process id of a process's parent. Raises OSError where there is no /proc."""
    return int(process_stat(pid)[1])


def children_of(pid: int) -> list[int]:
    """Return the process ids of the children of a process's main thread. Raises OSError where there is no /proc."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_ticks(pid: int) -> int:
    """Return when a process started, in ticks since the boot of its kernel. Raises OSError where there is no /proc."""
    return int(process_stat(pid)[19])


def process_age() -> float:
    """Return the seconds since this process was started; 0 if unknown, as without /proc."""
    try:
        ticks = start_ticks(os.getpid())
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
