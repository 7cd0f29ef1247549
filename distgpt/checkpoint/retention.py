"""Decide which checkpoints stay, and check that there is room for one more."""

import logging
import math
import shutil
from pathlib import Path

from distgpt.checkpoint.manifest import MANIFEST, committed, one_line, read_manifest, read_state
from distgpt.errors import DataError, StorageError

CHECKPOINT_BYTES = 12  # for each parameter: a float32 weight and AdamW's two moments
OUTER_BYTES = 8  # for each parameter, with independent replicas: the shared weight and its momentum

log = logging.getLogger(__name__)


def require_space(directory: Path, needed: int) -> None:
    """Raise StorageError unless the disk of `directory` has room for `needed` bytes and a little more."""
    free = shutil.disk_usage(directory).free
    wanted = needed * 1.02 + 2**20
    if free < wanted:
        # Rounded down and up, so that the message never shows two equal figures.
        free_mib, wanted_mib = math.floor(free / 2**20 * 10) / 10, math.ceil(wanted / 2**20 * 10) / 10
        raise StorageError(
            f"{directory} has {free_mib:.1f} MiB free and a checkpoint takes {wanted_mib:.1f} MiB with 1 MiB to spare: "
            "free some space or lower checkpoint.keep"
        )


def checkpoint_bytes(parameters: int, replicas: int) -> int:
    """Return the bytes of a checkpoint with this number of parameters and independent replicas."""
    return parameters * (CHECKPOINT_BYTES * replicas + (OUTER_BYTES if replicas > 1 else 0))


def prunable(directory: Path, *, keep: int) -> list[Path]:
    """List the checkpoints to remove: all but the newest `keep` and the one with the lowest validation loss.

    A checkpoint stays if it holds a file that is not in its manifest, or cannot be read.
    """
    losses = _losses(directory)
    best = _best(losses)
    removable = []
    for checkpoint in committed(directory)[keep:]:
        try:
            known = {MANIFEST, *read_manifest(checkpoint)}
            if checkpoint in losses and checkpoint != best and {file.name for file in checkpoint.iterdir()} == known:
                removable.append(checkpoint)
        except (OSError, DataError, StorageError) as error:
            log.warning("%s is not removed: %s", checkpoint, one_line(error))
    return removable


def best_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint with the lowest validation loss, None if there is none.

    Checkpoints with a damaged train.json are ignored.
    """
    return _best(_losses(directory))


def _losses(directory: Path) -> dict[Path, float]:
    """Read the validation losses of the checkpoints that can be read now; NaN where it is missing or damaged."""
    losses = {}
    for checkpoint in committed(directory):
        try:
            loss = read_state(checkpoint).val_loss
        except DataError:
            loss = None
        except StorageError as error:
            log.warning("%s", error)
            continue
        losses[checkpoint] = math.nan if loss is None else loss
    return losses


def _best(losses: dict[Path, float]) -> Path | None:
    finite = {checkpoint: loss for checkpoint, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda checkpoint: finite[checkpoint]) if finite else None
