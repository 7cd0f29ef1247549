"""List the runs under a directory: `python -m distgpt.runs [DIR]`. Imports no torch."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("runs")

import argparse
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from distgpt.errors import EXIT_OK, UsageError
from distgpt.run.exit_report import end_state, read_report
from distgpt.run.lock import renewing_owner
from distgpt.run.outcome import without_advice
from distgpt.run.paths import RunPaths
from distgpt.telemetry.step_lines import newest_line
from distgpt.units import duration, scaled_text, size_text

WATCH_SECONDS = 2.0
# A directory with one of these files is a run.
RUN_FILES = {"LOCK", "exit.json", "metrics.jsonl"}
# tomllib would take half of the time of the whole command.
STEPS = re.compile(r"^\[train\]\n(?:[^\[\n].*\n)*?steps = (\d+)$", re.MULTILINE)
HEADINGS = ("run", "state", "step", "loss", "val", "tok/s", "age", "size")
MIN_NAME_WIDTH = 8

State = Literal["running", "done", "interrupted", "failed"]


@dataclass(frozen=True)
class Run:
    """A run directory, as its files describe it. None: not known."""

    path: str
    state: State
    code: int | None  # exit code, if it has ended
    cause: str  # why it ended before its last step
    step: int | None
    steps: int | None
    loss: float | None
    val_loss: float | None
    tokens_per_second: float | None
    age: float  # seconds since its last line of metrics.jsonl or its end
    bytes: int


def main(arguments: argparse.Namespace) -> None:
    """Print the runs once, or again and again. Raises UsageError if the directory does not exist."""
    directory = Path(arguments.directory)
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory: give the one that holds your runs")
    if arguments.watch:
        watch(directory)
        return
    runs = read_runs(directory)
    width = shutil.get_terminal_size().columns
    if arguments.json:
        lines = [json.dumps(asdict(run)) for run in runs]
    else:
        lines = table(runs, directory, width) or [f"no runs in {directory}"]
    for line in lines:
        print(line)


def watch(directory: Path) -> None:
    """Show the runs until Ctrl-C, as many as the terminal has room for. Raises UsageError if there is no terminal."""
    if not sys.stdout.isatty():
        raise UsageError("--watch needs a terminal: leave it out to print the table once")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        while True:
            width, height = shutil.get_terminal_size()
            lines = table(read_runs(directory), directory, width)[: height - 1]
            print("\033[H\033[J" + "\n".join(lines), flush=True)  # from the top left corner of an empty screen
            time.sleep(WATCH_SECONDS)


def read_runs(directory: Path) -> list[Run]:
    """Describe the runs in a directory, the one that changed last first."""
    return sorted((read_run(path) for path in find_runs(directory)), key=lambda run: (run.age, run.path))


def find_runs(directory: Path) -> Iterator[Path]:
    """Yield the run directories in a directory, at any depth. A run holds no other; hidden directories are left out."""
    with suppress(OSError):  # it was removed, or may not be read
        entries = list(os.scandir(directory))
        if any(entry.name in RUN_FILES for entry in entries):
            yield directory
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from find_runs(Path(entry.path))


def read_run(path: Path) -> Run:
    """Describe a run directory."""
    paths = RunPaths(path)
    state, code, cause = state_of(paths)
    trained, evaluated = newest_line(paths.metrics, "loss"), newest_line(paths.metrics, "val_loss")
    steps = None
    with suppress(OSError, ValueError):
        found = STEPS.search(paths.config.read_text())
        steps = int(found[1]) if found else None
    changed = [_changed(paths.metrics), _changed(paths.exit_report)]
    return Run(
        path=str(path),
        state=state,
        code=code,
        cause=cause,
        step=trained.get("step"),
        steps=steps,
        loss=trained.get("loss"),
        val_loss=evaluated.get("val_loss"),
        tokens_per_second=trained.get("tokens_per_second"),
        age=max(0.0, time.time() - (max(changed) or _changed(path))),
        bytes=size_of(path),
    )


def state_of(paths: RunPaths) -> tuple[State, int | None, str]:
    """Return the state of a run, and the exit code and cause of its end, by its lease and exit.json."""
    if renewing_owner(paths):
        return "running", None, ""
    report = read_report(paths.exit_report)
    if report is None:
        return "interrupted", None, "killed, or its machine was lost: no rank could report"
    code = report["code"]
    return end_state(code), code, "" if code == EXIT_OK else without_advice(report["cause"])


def size_of(directory: Path | str) -> int:
    """Return the bytes of all files in a directory and below."""
    total = 0
    with suppress(OSError):
        for entry in os.scandir(directory):
            with suppress(OSError):  # it was removed meanwhile
                is_directory = entry.is_dir(follow_symlinks=False)
                total += size_of(entry.path) if is_directory else entry.stat(follow_symlinks=False).st_size
    return total


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def table(runs: Sequence[Run], directory: Path, width: int) -> list[str]:
    """Return the lines of a table that is at most `width` wide, with the cause below each run that has one."""
    if not runs:
        return []
    rows = [HEADINGS, *(_cells(run, directory) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    widths[0] = min(widths[0], max(MIN_NAME_WIDTH, width - sum(size + 2 for size in widths[1:])))
    lines = []
    for row, cause in zip(rows, ["", *(run.cause for run in runs)], strict=True):
        name = row[0] if len(row[0]) <= widths[0] else f"...{row[0][3 - widths[0] :]}"  # names of a sweep end apart
        numbers = [text.rjust(size) for text, size in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), row[1].ljust(widths[1]), *numbers]))
        lines += textwrap.wrap(cause, width, initial_indent="    ", subsequent_indent="    ")
    return lines


def _cells(run: Run, directory: Path) -> tuple[str, ...]:
    name = os.path.relpath(run.path, directory)
    step = "-" if run.step is None else str(run.step)
    return (
        run.path if name == "." else name,
        run.state,
        step if run.steps is None else f"{step}/{run.steps}",
        _decimals(run.loss),
        _decimals(run.val_loss),
        "-" if run.tokens_per_second is None else scaled_text(run.tokens_per_second, "rate"),
        duration(run.age),
        size_text(run.bytes),
    )


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
