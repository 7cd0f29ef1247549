"""Directories that the workers of a test run share: the first worker that needs one makes it."""

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a directory that `make` has filled, here or in another worker of this test run. Do not change it."""
    root = factory.getbasetemp() / "shared"  # a number is added to the names of all other directories there
    root.mkdir(exist_ok=True)
    directory, made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(directory, ignore_errors=True)  # left by a call of `make` that failed
            make(directory)
            made.touch()
    return directory
