"""Which checkpoints stay, and whether there is room for one more."""

import json
import logging
import shutil
from pathlib import Path

from distgpt.cluster.manifest import MANIFEST, committed, one_line, read_state
from distgpt.errors import DataError, StorageError

CHECKPOINT_BYTES = 12  # a parameter: a float32 weight and AdamW's two moments
STAGING, BROKEN = ".staging-", "broken-"  # how the names of directories begin that are no checkpoints

log = logging.getLogger(__name__)


def require_space(directory: Path, needed: int) -> None:
    """Raise StorageError unless the disk has room for `needed` bytes and a little more."""
    free = shutil.disk_usage(directory).free
    if free < needed * 1.02 + 2**20:
        raise StorageError(
            f"{directory} has {free / 2**20:.0f} MiB free and a checkpoint takes {needed / 2**20:.0f} MiB: "
            "free some space or lower checkpoint.keep"
        )


def prune(directory: Path, *, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` and the one with the lowest validation loss.

    A directory that holds a file that is not in its manifest is left alone.
    """
    best = best_of(directory)
    for checkpoint in committed(directory)[keep:]:
        try:
            ours = {MANIFEST, *json.loads((checkpoint / MANIFEST).read_bytes())["files"]}
            if checkpoint != best and {f.name for f in checkpoint.iterdir()} == ours:
                # Under another name first: a kill in between leaves no half of one under a whole one's name.
                shutil.rmtree(checkpoint.rename(directory / f"{STAGING}{checkpoint.name}"))
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s stays: %s", checkpoint, one_line(error))


def best_of(directory: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, None if none was evaluated."""
    losses: dict[Path, float] = {}
    for checkpoint in committed(directory):
        try:
            loss = read_state(checkpoint).val_loss
        except DataError:
            continue
        if loss is not None:
            losses[checkpoint] = loss
    return min(losses, key=lambda checkpoint: losses[checkpoint]) if losses else None
