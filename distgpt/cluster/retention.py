"""Which checkpoints stay, and whether there is room for one more."""

import logging
import math
import shutil
from pathlib import Path

from distgpt.cluster.manifest import MANIFEST, committed, one_line, read_manifest, read_state
from distgpt.errors import DataError, StorageError

CHECKPOINT_BYTES = 12  # a parameter: a float32 weight and AdamW's two moments

log = logging.getLogger(__name__)


def require_space(directory: Path, needed: int) -> None:
    """Raise StorageError unless the disk has room for `needed` bytes and a little more."""
    free = shutil.disk_usage(directory).free
    if free < needed * 1.02 + 2**20:
        raise StorageError(
            f"{directory} has {free / 2**20:.0f} MiB free and a checkpoint takes {needed / 2**20:.0f} MiB: "
            "free some space or lower checkpoint.keep"
        )


def surplus(directory: Path, *, keep: int) -> list[Path]:
    """The checkpoints to remove: all but the newest `keep` and the one with the lowest validation loss.

    One that holds a file that is not in its manifest, or whose manifest is damaged, is left alone. Raises StorageError
    if one cannot be read now: it may be the best.
    """
    best = best_of(directory)
    found = []
    for checkpoint in committed(directory)[keep:]:
        try:
            ours = {MANIFEST, *read_manifest(checkpoint)}
            if checkpoint != best and {file.name for file in checkpoint.iterdir()} == ours:
                found.append(checkpoint)
        except (OSError, DataError) as error:
            log.warning("%s stays: %s", checkpoint, one_line(error))
    return found


def best_of(directory: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, None if there is none. A damaged train.json counts not."""
    losses: dict[Path, float] = {}
    for checkpoint in committed(directory):
        try:
            loss = read_state(checkpoint).val_loss
        except DataError:
            continue
        if loss is not None and math.isfinite(loss):
            losses[checkpoint] = loss
    return min(losses, key=lambda checkpoint: losses[checkpoint]) if losses else None
