"""Change the directory of checkpoints, on rank 0, so that a kill at any moment leaves each one whole or not there.

Unfinished checkpoints, and those being removed, lie in a staging directory named after the owner of the run directory.
The next owner moves that away before it starts, so a rename that the earlier owner was about to make has no source.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distgpt.checkpoint.manifest import MANIFEST, is_file_of_ours, manifest_bytes, path_of
from distgpt.checkpoint.retention import require_space
from distgpt.errors import DISK_FULL, DirectoryError, StorageError
from distgpt.files import sync, write_file
from distgpt.run.lock import Owner

STAGING, BROKEN = ".staging-", "broken-"  # beginnings of the names of directories that are no checkpoints


def require_writable(directory: Path) -> None:
    """Raise DirectoryError if checkpoints cannot be written there: the first save would be too late to find out."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=STAGING, dir=directory).cleanup()
    except OSError as error:
        if error.errno not in DISK_FULL:  # there may be room in time
            raise DirectoryError(f"cannot write to {directory} ({error.strerror}): choose another --run.dir") from None


class Store:
    """The checkpoints of a run, changed by its owner. Methods raise OSError."""

    def __init__(self, directory: Path, owner: Owner) -> None:
        self.directory = directory
        self._own = directory / f"{STAGING}{owner.label}"
        self._fence = owner.fence

    def staging(self, step: int) -> Path:
        """Return where the checkpoint of a step is written."""
        return self._own / path_of(self.directory, step).name

    def open(self, step: int, needed: int) -> None:
        """Make the staging directory of a step. Raises StorageError unless there is room for `needed` bytes."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync(self.directory.parent)
        require_space(self.directory, needed)
        self._own.mkdir(exist_ok=True)
        self.staging(step).mkdir()

    def commit(self, step: int, files: dict[str, dict[str, Any]]) -> None:
        """Give a staged checkpoint its manifest and its name. Its other files are on the disk already."""
        staging = self.staging(step)
        write_file(staging / MANIFEST, manifest_bytes(files))
        target = path_of(self.directory, step)
        try:
            staging.rename(target)
        except OSError as error:
            if not os.path.lexists(target):
                raise
            raise StorageError(f"{target} is in the way, and is not of this attempt: move it away") from error
        sync(self.directory)

    def close(self) -> None:
        """Remove what is still staged."""
        shutil.rmtree(self._own, ignore_errors=True)

    def remove(self, checkpoints: Sequence[Path]) -> None:
        """Remove these checkpoints, during a save. A kill leaves no half of one under its name."""
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint.rename(self._own / f"removed-{checkpoint.name}"))

    def begin(self) -> None:
        """Make the staging directory. The caller then checks that it still owns the run directory."""
        self._own.mkdir(exist_ok=True)

    def set_aside(self, names: Sequence[str]) -> None:
        """Rename damaged checkpoints, the newest last, for a person to look at; only the newest one stays.

        Call begin() first.
        """
        for name in names:
            # By way of the staging directory, which the next owner takes away: it may have made another of this name.
            held = (self.directory / name).rename(self._own / name)
            held.rename(self.directory / f"{BROKEN}{name}-{time.time_ns()}")
        self._remove_all_but_newest_broken()
        self.close()

    def _remove_all_but_newest_broken(self) -> None:
        broken = [d for d in self.directory.glob(f"{BROKEN}*") if re.fullmatch(BROKEN + r"step-\d{8,}-\d+", d.name)]
        earlier = sorted(broken, key=lambda d: int(d.name.rpartition("-")[2]))[:-1]
        if earlier:
            self.begin()
            self.remove([d for d in earlier if all(is_file_of_ours(file.name) for file in d.iterdir())])

    def remove_left_overs(self) -> None:
        """Remove what earlier owners, dead or suspended, did not finish. What a later one stages stays."""
        for left_over in self.directory.glob(f"{STAGING}*"):
            fence = re.match(r"(\d+)-", left_over.name.removeprefix(STAGING))
            if left_over != self._own and (fence is None or int(fence[1]) <= self._fence):
                self.begin()
                # By one rename, after which nothing can be written or renamed under the old name.
                left_over.rename(self._own / left_over.name)
        self._remove_all_but_newest_broken()
        self.close()
