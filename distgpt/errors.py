"""Exceptions that end a command early, and their exit codes.

A user's mistake is an exception with one clear line: what is wrong, where, and the fix.
`cli.main_guard` prints that line on stderr and exits with its code. Any other exception is our bug, with a traceback.
"""

import difflib
import errno
import os
import signal
from collections.abc import Iterable
from pathlib import Path

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_BUG = 70
EXIT_CANNOT_CREATE = 73
EXIT_IO = 74
EXIT_INTERRUPTED = 75

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class DistgptError(Exception):
    """An error that the user can act on; `code` is the exit code of the command."""

    code = EXIT_BUG


class UsageError(DistgptError):
    """A flag, key, value or combination that cannot work."""

    code = EXIT_USAGE


class DataError(DistgptError):
    """Input text, prepared data, checkpoint or loss that cannot be used."""

    code = EXIT_DATA


class DirectoryError(DistgptError):
    """An output directory that is locked, not writable or in the way."""

    code = EXIT_CANNOT_CREATE


class StorageError(DistgptError):
    """A read or write that failed: disk full, file gone, I/O error."""

    code = EXIT_IO


class Interrupted(DistgptError):
    """A stop before the end, for example by a signal. The same command, run again, goes on from there."""

    code = EXIT_INTERRUPTED


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the most similar known name, to end an error with; "" if none is similar."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def did_you_mean_path(path: Path) -> str:
    """Return the same for a path that does not exist, with the most similar one in its directory."""
    try:
        beside = {} if path.exists() else {name: path.with_name(name) for name in os.listdir(path.parent)}
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"; did you mean {beside[near[0]]}?" if near else ""
