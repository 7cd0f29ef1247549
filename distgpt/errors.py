"""What can end a command early, and the exit code of each.

A user's mistake is an exception with one clear line: what is wrong, where, and the fix.
`main_guard` turns it into that line on stderr and the exit code; anything else is our bug and keeps its traceback.
"""

import argparse
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

T = TypeVar("T")

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_BUG = 70
EXIT_CANNOT_CREATE = 73
EXIT_IO = 74
EXIT_INTERRUPTED = 75

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Seconds that a rank leaves rank 0 to find the same mistake and say it: the first rank to end has torchrun end all.
RANK_ZERO_SECONDS = 30.0


class DistgptError(Exception):
    """A cause that the user can act on; `code` is the exit code of the command that it ends."""

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
    """Reading or writing failed: disk full, file gone, I/O error."""

    code = EXIT_IO


class Interrupted(DistgptError):
    """A signal asked the command to stop; run again, it goes on."""

    code = EXIT_INTERRUPTED


def enter() -> None:
    """The first line of a command that imports torch: a signal to stop ends it silently, also during the imports.

    Characters that the encoding of stdout lacks are printed as "?".
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _leave_interrupted)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _leave_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    # Not by an exception: what imports would print it, or go on without what it was importing.
    os._exit(EXIT_INTERRUPTED)


def main_guard(main: Callable[[], T]) -> T:
    """Return `main()`, or end the process with a DistgptError's code and its line on stderr, from rank 0 if it can."""
    try:
        return main()
    except DistgptError as error:
        if "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_ZERO_SECONDS)  # by then torchrun has ended this rank, unless it alone found the mistake
        print_cause(f"distgpt: error: {error}")
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader left (`| head`): point stdout at nothing so that the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_IO)
    except OSError as error:
        if error.errno not in DISK_FULL:
            traceback.print_exc()
            sys.exit(EXIT_BUG)
        print(f"distgpt: error: cannot write: {error.strerror}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_IO)
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_BUG)


def print_cause(line: str) -> None:
    """Print why this process ends on stderr, and have torchrun say so too."""
    print(line, file=sys.stderr, flush=True)
    record_cause(line)


def record_cause(line: str) -> None:
    """Have torchrun say why this rank ended at the end of its own report, which stands far below what a rank prints."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # The format of torch.distributed.elastic.multiprocessing.errors.
        error = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": error}))


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a UsageError, one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help shows the options)")


def user_path(text: str) -> str:
    """A path as a person wrote it, with ~ expanded, for flags and files that no shell expands it in. Raises UsageError.

    A variable is refused unless there is a file of that very name: a directory that is called $HOME helps nobody.
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
