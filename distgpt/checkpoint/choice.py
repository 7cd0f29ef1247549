"""Choose the checkpoint that a command reads. Imports no torch."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from distgpt.checkpoint.manifest import (
    CHECKPOINT_NAME,
    MANIFEST,
    checkpoint_path,
    committed,
    describe_damage,
    find_damage,
    step_of,
)
from distgpt.checkpoint.store import best_checkpoint
from distgpt.errors import DataError, UsageError, did_you_mean, did_you_mean_path

BEST, NEWEST = "best", "newest"


def add_option(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add the option --checkpoint. `default`: what --help says about a command without it."""
    parser.add_argument(
        "--checkpoint",
        metavar=f"{BEST}|{NEWEST}|STEP|DIR",
        default=NEWEST,
        help=f"{BEST}: the one with the lowest validation loss; DIR: its directory (default: {default})",
    )


def choose(run: Path, choice: str = NEWEST) -> Path:
    """Find the checkpoint that a command reads: the newest good one of a run directory, its best one, or one of a step.

    `run` or `choice` may also be the directory of a checkpoint. Prints on stderr which ones were skipped and why.
    Raises UsageError if the run has no such checkpoint, DataError if it is damaged or the run has no checkpoint at all.
    """
    if is_checkpoint(run):
        if choice != NEWEST:
            raise UsageError(f"{run} is one checkpoint: to choose {choice}, give its run directory")
        return _require_good(run.resolve())  # resolved, since `run` may be "." or a link
    if choice not in (BEST, NEWEST) and is_checkpoint(Path(choice)):
        return _require_good(Path(choice).resolve())
    directory = run / "checkpoints"
    steps = [step_of(checkpoint) for checkpoint in committed(directory)]
    if choice == NEWEST or not steps:
        return _newest_of(run)
    if choice == BEST:
        best = best_checkpoint(directory)
        if best is None:
            raise UsageError(f"no checkpoint of {run} has a validation loss: choose {NEWEST}")
        return _require_good(best)
    step = choice.removeprefix("step-").lstrip("0") or "0"
    if step in map(str, steps):
        return _require_good(checkpoint_path(directory, int(step)))
    all_steps = ", ".join(map(str, reversed(steps)))
    hint = did_you_mean(choice, [BEST, NEWEST, *map(str, steps)])
    raise UsageError(f"{run} has no checkpoint {choice}: choose {BEST}, {NEWEST} or a step of {all_steps}{hint}")


def is_checkpoint(directory: Path) -> bool:
    """Tell whether a path is a checkpoint, whole or damaged, and not a run."""
    # Path.is_dir() raises an error for a path that is too long.
    return os.path.isdir(directory) and (
        (directory / MANIFEST).exists() or CHECKPOINT_NAME.fullmatch(directory.resolve().name) is not None
    )


def _newest_of(run: Path) -> Path:
    checkpoint, damaged = newest_good(committed(run / "checkpoints"))
    if checkpoint is not None:
        if damaged:
            print(f"distgpt: reading {checkpoint}; skipped {describe_damage(damaged)}", file=sys.stderr)
        return checkpoint
    if damaged:
        raise DataError(f"{run} holds no whole checkpoint ({describe_damage(damaged)})")
    if run.is_file():
        raise DataError(f"{run} is a file: give the run directory")
    if (run / "meta.json").exists():
        raise DataError(f"{run} is prepared data, not a run directory")
    if hint := did_you_mean_path(run):
        raise DataError(f"{run} does not exist{hint}")
    raise DataError(f"{run} holds no checkpoint: train one with python -m distgpt.train --run.dir={run}")


def _require_good(checkpoint: Path) -> Path:
    """Return a checkpoint that the user chose. Raises DataError if it is damaged."""
    problems = find_damage(checkpoint)
    if problems:
        raise DataError(f"{checkpoint} is damaged ({problems[0]}): choose another checkpoint")
    return checkpoint


def newest_good(
    newest_first: Iterable[Path], damage_of: Callable[[Path], list[str]] = find_damage
) -> tuple[Path | None, dict[str, str]]:
    """Return the newest good checkpoint, or None, and the damage of the newer ones, by name.

    `damage_of` lists the damage of a checkpoint.
    """
    damaged: dict[str, str] = {}
    for checkpoint in newest_first:
        problems = damage_of(checkpoint)
        if not problems:
            return checkpoint, damaged
        damaged[checkpoint.name] = problems[0]
    return None, damaged
