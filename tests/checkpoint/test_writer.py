"""The files of a save: hashed while they are written, and on the disk before the commit."""

import builtins
import os
from pathlib import Path
from typing import Any

import pytest

from distgpt.checkpoint.manifest import find_damage
from distgpt.corpus.shards import Dataset
from tests.checkpoint.checkpoints import newest, trainee


def test_tensor_files_are_hashed_while_they_are_written(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = trainee(tmp_path, dataset)
    read: list[str] = []
    original = os.open

    def noting(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) == 0:
            read.append(str(path))
        return original(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", noting)  # manifest.open_file() opens files with it
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.require_saved(1)
    assert any(path.endswith("train.json") for path in read), read
    assert not [path for path in read if path.endswith(".distcp")]
    monkeypatch.undo()
    assert find_damage(newest(tmp_path)) == []


def test_a_file_that_cannot_be_synced_is_no_checkpoint(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes the index, which DCP would sync before Python's buffer is flushed."""
    subject = trainee(tmp_path, dataset)
    opened: dict[int, str] = {}
    original_open, original_sync = builtins.open, os.fsync

    def tracking(file: Any, *rest: Any, **named: Any) -> Any:
        stream = original_open(file, *rest, **named)
        opened[stream.fileno()] = str(file)
        return stream

    def failing(fd: int) -> None:
        if opened.get(fd, "").endswith(".metadata.tmp"):
            size = os.fstat(fd).st_size
            raise OSError(5, f"Input/output error after {size > 0}")
        original_sync(fd)

    monkeypatch.setattr(builtins, "open", tracking)
    monkeypatch.setattr(os, "fsync", failing)
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.wait()
    assert subject.messages == ["CHECKPOINT NOT SAVED, training goes on: Input/output error after True"]
    assert not list((tmp_path / "checkpoints").glob("step-*"))
