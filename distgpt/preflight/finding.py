"""A finding of a check: ok, a warning, or a failure with its fix and exit code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from distgpt.errors import EXIT_IO, EXIT_OK, DistgptError

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What a check found. `code`: the exit code that it stands for where it failed."""

    check: str
    level: Level
    text: str
    code: int = EXIT_OK

    def __str__(self) -> str:
        return f"{self.level:<5} {self.check:<14} {self.text}"


def found(check: str, text: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", text)


def warning(check: str, text: str) -> Finding:
    """Training can start, but a person should know."""
    return Finding(check, "warn", text)


def failure(check: str, error: Exception) -> Finding:
    """Training cannot start."""
    if isinstance(error, DistgptError):
        return Finding(check, "FAIL", str(error), error.code)
    return Finding(check, "FAIL", f"{type(error).__name__}: {error}", EXIT_IO)


def exit_code(findings: list[Finding]) -> int:
    """That of the first failure."""
    return next((finding.code for finding in findings if finding.level == "FAIL"), EXIT_OK)


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """What `check` finds, or the failure that it raises."""
    try:
        return check()
    except (DistgptError, OSError) as error:
        return failure(name, error)
