"""Decide what follows the end of an attempt: the run is done, the launcher gives up, or it starts again."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from distgpt.checkpoint.manifest import committed
from distgpt.errors import EXIT_CANNOT_CREATE, EXIT_INTERRUPTED, EXIT_OK
from distgpt.run.outcome import without_advice
from distgpt.run.paths import RunPaths


@dataclass(frozen=True)
class Ending:
    """The end of an attempt, as the first rank that knew the cause reported it. `code`: None without a report."""

    code: int | None
    cause: str
    step: int = 0

    @classmethod
    def from_report(cls, report: dict[str, Any] | None, *, otherwise: str) -> Self:
        """Return the ending that a report describes; without a report, the code None and the cause `otherwise`."""
        return cls(report["code"], report["cause"], report.get("step") or 0) if report else cls(None, otherwise)

    @property
    def cause_without_advice(self) -> str:
        """The cause without the advice to run it again, for a launcher that does so itself."""
        return without_advice(self.cause)


def can_retry(code: int | None, *, lock_may_be_ours: bool = False) -> bool:
    """Tell whether a launcher starts again after an attempt with this exit code. None: no rank could report.

    `lock_may_be_ours`: an earlier attempt of the same job, cut off on another host, may still hold the run directory.
    """
    return code in (None, EXIT_INTERRUPTED) or (code == EXIT_CANNOT_CREATE and lock_may_be_ours)


class Tries:
    """Counts the attempts in a row that left no new checkpoint in a run directory."""

    def __init__(self, limit: int, run_dir: Path) -> None:
        self.limit = limit
        self.count = 0
        self._run_dir = run_dir
        self.newest = newest_checkpoint(run_dir)

    def count_failure(self) -> bool:
        """Count a failed attempt; tell whether the limit is reached."""
        before = self.newest
        with suppress(OSError):  # a disk that cannot be read now counts as no progress
            self.newest = newest_checkpoint(self._run_dir)
        self.count = self.count + 1 if self.newest == before else 0
        return self.count >= self.limit


def newest_checkpoint(run_dir: Path) -> str | None:
    """Return the name of the newest committed checkpoint, whole or damaged, None if there is none."""
    return next((checkpoint.name for checkpoint in committed(RunPaths(run_dir).checkpoints)), None)


def say(line: str) -> None:
    """Print a line on stderr. Unbuffered: if the terminal is gone, a buffer would fail again at the exit."""
    with suppress(OSError):
        os.write(2, f"distgpt: {line}\n".encode())


def say_end(code: int, cause: str) -> None:
    """Print why a run ended, as its ranks do."""
    say(cause if code in (EXIT_OK, EXIT_INTERRUPTED) else f"error: {cause}")
