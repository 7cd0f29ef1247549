"""The result of a check: ok, a warning, or a failure with its fix and exit code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from distgpt.errors import EXIT_IO, EXIT_OK, DistgptError

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """The result of a check. `code`: the exit code of a failure, else 0."""

    check: str
    level: Level
    text: str
    code: int = EXIT_OK

    def __str__(self) -> str:
        return f"{self.level:<5} {self.check:<14} {self.text}"


def ok(check: str, text: str) -> Finding:
    """Report a check that passed."""
    return Finding(check, "ok", text)


def warning(check: str, text: str) -> Finding:
    """Report a problem that does not prevent training."""
    return Finding(check, "warn", text)


def failure(check: str, error: Exception) -> Finding:
    """Report a problem that prevents training."""
    if isinstance(error, DistgptError):
        return Finding(check, "FAIL", str(error), error.code)
    return Finding(check, "FAIL", f"{type(error).__name__}: {error}", EXIT_IO)


def exit_code(findings: list[Finding]) -> int:
    """Return the exit code of the first failure, 0 if there is none."""
    return next((finding.code for finding in findings if finding.level == "FAIL"), EXIT_OK)


def run_check(name: str, check: Callable[[], Finding]) -> Finding:
    """Run `check` and return its finding. An error in it becomes a failure of the check `name`."""
    try:
        return check()
    except (DistgptError, OSError) as error:
        return failure(name, error)
