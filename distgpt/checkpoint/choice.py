"""Which checkpoint of a run a command reads. Imports no torch."""

import argparse
import os
import sys
from pathlib import Path

from distgpt.checkpoint.manifest import MANIFEST, NAME, all_broken, committed, damage, listed, path_of, step_of
from distgpt.checkpoint.retention import best_of
from distgpt.errors import DataError, UsageError

BEST, NEWEST = "best", "newest"


def add_option(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add --checkpoint; `default` says which one is taken without it."""
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default=NEWEST,
        help=f"{BEST} (the lowest validation loss), {NEWEST}, a step or a checkpoint's directory (default: {default})",
    )


def choose(run: Path, choice: str = NEWEST) -> Path:
    """The checkpoint that a command reads: a run directory's newest good one, its best one or that of a step.

    `run` or `choice` may be the directory of a checkpoint as well. Says on stderr in one line what it skipped and why.
    Raises UsageError if there is none as chosen, DataError if it is damaged or if the run has none at all.
    """
    if is_checkpoint(run):
        if choice != NEWEST:
            raise UsageError(f"{run} is a checkpoint already: leave out --checkpoint={choice}")
        return _require_good(run.resolve())  # "." and links have other names
    if choice not in (BEST, NEWEST) and is_checkpoint(Path(choice)):
        return _require_good(Path(choice).resolve())
    directory = run / "checkpoints"
    steps = [step_of(checkpoint) for checkpoint in committed(directory)]
    if choice == NEWEST or not steps:
        return _newest_of(run)
    if choice == BEST:
        best = best_of(directory)
        if best is None:
            raise UsageError(f"no checkpoint of {run} has a validation loss: take --checkpoint={NEWEST}")
        return _require_good(best)
    step = choice.removeprefix("step-").lstrip("0") or "0"
    if step in map(str, steps):
        return _require_good(path_of(directory, int(step)))
    there = ", ".join(map(str, reversed(steps)))
    raise UsageError(f"--checkpoint is {choice}: {run} has {BEST}, {NEWEST} and those of the steps {there}")


def is_checkpoint(directory: Path) -> bool:
    """Whether a path names a checkpoint, whole or damaged, rather than a run."""
    # A path may be too long to be one, of which Path.is_dir() makes an error.
    there = os.path.isdir(directory)
    return there and ((directory / MANIFEST).exists() or NAME.fullmatch(directory.resolve().name) is not None)


def _newest_of(run: Path) -> Path:
    checkpoint, broken = newest_good(run / "checkpoints")
    if checkpoint is None and broken:
        raise DataError(f"{run} {all_broken(broken)}")
    if checkpoint is None:
        raise DataError(f"{run} holds no checkpoint: train one with python -m distgpt.train --run.dir={run}")
    if broken:
        print(f"distgpt: reading {checkpoint}; skipped {listed(broken)}", file=sys.stderr)
    return checkpoint


def _require_good(checkpoint: Path) -> Path:
    """A checkpoint that was asked for by name. Raises DataError if it is damaged."""
    problems = damage(checkpoint)
    if problems:
        raise DataError(f"{checkpoint} is damaged ({problems[0]}): choose another with --checkpoint")
    return checkpoint


def newest_good(directory: Path, *, before: int | None = None) -> tuple[Path | None, dict[str, str]]:
    """The newest whole checkpoint, of a step below `before` where that is given, and what is wrong with newer ones."""
    broken: dict[str, str] = {}
    for checkpoint in committed(directory):
        if before is not None and step_of(checkpoint) >= before:
            continue
        problems = damage(checkpoint)
        if not problems:
            return checkpoint, broken
        broken[checkpoint.name] = problems[0]
    return None, broken
