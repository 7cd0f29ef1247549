"""Decide what the ending of an attempt means: the job is done, it gives up, or it starts again."""

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distgpt.checkpoint.manifest import committed
from distgpt.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError
from distgpt.run.paths import RunPaths

MOST = 999_999_999
UNKNOWN_CAUSE = "killed before any rank could say why: run it again to go on"


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: the exit code and the cause in a report."""

    code: int
    cause: str

    @property
    def retryable(self) -> bool:
        """Whether starting again can help."""
        return self.code == EXIT_INTERRUPTED

    @property
    def reason(self) -> str:
        """The cause without the advice to run it again, which a launcher follows by itself."""
        return self.cause.removesuffix("run it again to go on").rstrip(" ,:") if self.retryable else self.cause


def read_ending(report: Path) -> Ending | None:
    """Read an exit report; None if there is none yet."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(report.read_text())
        return Ending(int(values["code"]), str(values["cause"]))
    return None


class Tries:
    """Counts attempts in a row that made no new checkpoint."""

    def __init__(self, limit: int, paths: RunPaths) -> None:
        self.count, self._limit, self._paths = 0, limit, paths
        self._newest = self.newest_checkpoint

    @property
    def newest_checkpoint(self) -> str | None:
        """The name of the newest checkpoint."""
        return next((checkpoint.name for checkpoint in committed(self._paths.checkpoints)), None)

    def exhausted(self) -> bool:
        """Count an attempt that ended; tell whether it was the last one to try."""
        newest = self.newest_checkpoint
        self.count = self.count + 1 if newest == self._newest else 0
        self._newest = newest
        return self.count >= self._limit


def count_from_environment(name: str, default: int | None) -> int | None:
    """Read a whole number from 1 from an environment variable. Raises UsageError."""
    text = os.environ.get(name) or ""
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and not text.startswith("0") and int(text) <= MOST):
        raise UsageError(f"{name}={text}: it must be a whole number from 1")
    return int(text)


def say(line: str) -> None:
    """Print a line on stderr. The terminal may be gone."""
    with suppress(OSError):
        print(f"distgpt: {line}", file=sys.stderr, flush=True)


def say_end(ending: Ending) -> None:
    """Print why a job ended, as its ranks would."""
    say(ending.cause if ending.code in (EXIT_OK, EXIT_INTERRUPTED) else f"error: {ending.cause}")
