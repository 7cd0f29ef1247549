"""The directory of checkpoints: the best one, those to remove, and changes that a kill cannot leave half done.

Unfinished checkpoints, and those being removed, are in a staging directory named after the owner of the run directory.
The next owner moves it away before it starts. So an earlier owner that wakes up cannot rename anything from it.
"""

import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distgpt.checkpoint.manifest import (
    MANIFEST,
    Link,
    Origin,
    checkpoint_path,
    committed,
    is_checkpoint_file,
    manifest_bytes,
    one_line,
    read_manifest,
    read_state,
)
from distgpt.errors import DISK_FULL, DataError, DirectoryError, StorageError
from distgpt.files import sync, write_file
from distgpt.run.lock import Owner

STAGING_PREFIX, BROKEN_PREFIX = ".staging-", "broken-"  # of directories that are no checkpoints

log = logging.getLogger(__name__)


def require_space(directory: Path, size: int) -> None:
    """Raise StorageError unless the disk of `directory` has room for a checkpoint of `size` bytes and a little more."""
    free = shutil.disk_usage(directory).free
    wanted = size * 1.02 + 2**20
    if free < wanted:
        # Rounded down and up, so that the message never shows two equal figures.
        free_mib, wanted_mib = math.floor(free / 2**20 * 10) / 10, math.ceil(wanted / 2**20 * 10) / 10
        raise StorageError(
            f"{directory} has {free_mib:.1f} MiB free and a checkpoint takes {wanted_mib:.1f} MiB with 1 MiB to spare: "
            "free some space or lower checkpoint.keep"
        )


def prunable(directory: Path, *, keep: int) -> list[Path]:
    """List the checkpoints to remove: all but the newest `keep` and the one with the lowest validation loss.

    A checkpoint stays if it holds a file that is not in its manifest, or cannot be read.
    """
    losses = _val_losses(directory)
    best = _lowest(losses)
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
    """Return the checkpoint with the lowest validation loss that can be read, None if there is none."""
    return _lowest(_val_losses(directory))


def _val_losses(directory: Path) -> dict[Path, float]:
    """Read the validation loss of each checkpoint that can be read now. A missing or damaged one is NaN."""
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


def _lowest(losses: dict[Path, float]) -> Path | None:
    finite = {checkpoint: loss for checkpoint, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda checkpoint: finite[checkpoint], default=None)


def require_writable(directory: Path) -> None:
    """Raise DirectoryError if checkpoints cannot be written to `directory`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=STAGING_PREFIX, dir=directory).cleanup()
    except OSError as error:
        if error.errno not in DISK_FULL:  # a full disk may have room by the time of a save
            raise DirectoryError(f"cannot write to {directory} ({error.strerror}): choose another --run.dir") from None


class Store:
    """Changes the directory of checkpoints, on rank 0. Each checkpoint in it is whole at every moment.

    Methods raise OSError.
    """

    def __init__(self, directory: Path, owner: Owner) -> None:
        self.directory = directory
        self._staging_root = directory / f"{STAGING_PREFIX}{owner.label}"
        self._fence = owner.fence
        self.newest: Link | None = None  # the checkpoint that the next one follows

    def staging(self, step: int) -> Path:
        """Return the staging directory of a step."""
        return self._staging_root / checkpoint_path(self.directory, step).name

    def create_staging(self, step: int, size: int) -> None:
        """Create the staging directory of a step. Raises StorageError unless there is room for `size` bytes."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync(self.directory.parent)
        require_space(self.directory, size)
        self.create_staging_root()
        self.staging(step).mkdir()

    def commit(self, step: int, files: dict[str, dict[str, Any]], origin: Origin) -> None:
        """Write the manifest of a staged checkpoint, which follows the `newest` one, and rename it.

        Its other files are already on the disk.
        """
        staging, manifest = self.staging(step), manifest_bytes(files, replace(origin, previous=self.newest))
        write_file(staging / MANIFEST, manifest)
        target = checkpoint_path(self.directory, step)
        try:
            staging.rename(target)
        except OSError as error:
            if not os.path.lexists(target):
                raise
            raise StorageError(f"{target} is in the way, and this attempt did not write it: move it away") from error
        self.newest = Link(step, hashlib.sha256(manifest).hexdigest())
        sync(self.directory)

    def remove_staging(self) -> None:
        """Remove the staging directories of this owner."""
        shutil.rmtree(self._staging_root, ignore_errors=True)

    def remove(self, checkpoints: Sequence[Path]) -> None:
        """Remove checkpoints. Each is moved to the staging root first, so that a kill leaves none half removed."""
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint.rename(self._staging_root / f"removed-{checkpoint.name}"))

    def create_staging_root(self) -> None:
        """Create the parent of the staging directories. Afterwards, check that the run directory is still owned."""
        self._staging_root.mkdir(exist_ok=True)

    def set_aside(self, names: Sequence[str]) -> None:
        """Rename damaged checkpoints, given with the newest last, and keep only the newest one for inspection.

        Call create_staging_root() before, then check that the run directory is still owned.
        """
        for name in names:
            # If a next owner has taken over, this name may be that of its checkpoint. But then the staging root is
            # gone, so that the first rename fails.
            moved = (self.directory / name).rename(self._staging_root / name)
            moved.rename(self.directory / f"{BROKEN_PREFIX}{name}-{time.time_ns()}")
        self._remove_all_but_newest_broken()
        self.remove_staging()

    def _remove_all_but_newest_broken(self) -> None:
        broken = [
            d
            for d in self.directory.glob(f"{BROKEN_PREFIX}*")
            if re.fullmatch(BROKEN_PREFIX + r"step-\d{8,}-\d+", d.name)
        ]
        earlier = sorted(broken, key=lambda d: int(d.name.rpartition("-")[2]))[:-1]
        if earlier:
            self.create_staging_root()
            self.remove([d for d in earlier if all(is_checkpoint_file(file.name) for file in d.iterdir())])

    def remove_leftovers(self) -> None:
        """Remove the staging directories of earlier owners, dead or suspended, but none of a later owner."""
        for leftover in self.directory.glob(f"{STAGING_PREFIX}*"):
            fence = re.match(r"(\d+)-", leftover.name.removeprefix(STAGING_PREFIX))
            if leftover != self._staging_root and (fence is None or int(fence[1]) <= self._fence):
                self.create_staging_root()
                # After this rename, the earlier owner can write and rename nothing under the old name.
                leftover.rename(self._staging_root / leftover.name)
        self._remove_all_but_newest_broken()
        self.remove_staging()
