"""What all commands share: exit codes, signals before torch is imported, the parser of options. Imports no torch."""

import argparse
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from distgpt.errors import DISK_FULL, EXIT_BUG, EXIT_INTERRUPTED, EXIT_IO, STOP_SIGNALS, DistgptError, T, UsageError
from distgpt.torchrun import RANK_ZERO_SECONDS, print_cause


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


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a UsageError, one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help shows the options)")
