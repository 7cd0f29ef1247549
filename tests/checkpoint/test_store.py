"""Old checkpoints are removed, but none that is still needed, and no file that distgpt did not write."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from distgpt.checkpoint.manifest import manifest_bytes
from distgpt.checkpoint.store import best_checkpoint, prunable, require_space
from distgpt.errors import StorageError


def make(directory: Path, *, step: int, val_loss: float | None) -> Path:
    """A checkpoint without tensors, enough to prune."""
    made = directory / f"step-{step:08d}"
    made.mkdir(parents=True)
    hashes = {"data_fingerprint": "", "tokenizer_sha256": ""}
    state: dict[str, object] = {"step": step, "val_loss": val_loss, "vocab_size": 1, "eot_id": None}
    content = json.dumps({**state, "config": {}, **hashes}).encode()
    (made / "train.json").write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (made / "manifest.json").write_bytes(manifest_bytes({"train.json": entry}, None))
    return made


def steps(checkpoints: list[Path]) -> list[int]:
    return [int(checkpoint.name.removeprefix("step-")) for checkpoint in checkpoints]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    for step, val_loss in [(1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, 1.6), (6, None)]:
        make(tmp_path, step=step, val_loss=val_loss)
    assert steps(prunable(tmp_path, keep=2)) == [4, 3, 1]
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000002"
    make(tmp_path, step=7, val_loss=1.0)
    assert steps(prunable(tmp_path, keep=2)) == [5, 4, 3, 2, 1]
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000007"
    assert prunable(tmp_path, keep=7) == []


def test_nan_is_not_the_best_validation_loss(tmp_path: Path) -> None:
    for step, val_loss in [(1, 1.5), (2, 2.5), (3, float("nan"))]:
        make(tmp_path, step=step, val_loss=val_loss)
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000001"


def test_files_that_distgpt_did_not_write_stay(tmp_path: Path) -> None:
    for step in range(1, 6):
        make(tmp_path, step=step, val_loss=None)
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000002" / "manifest.json").write_text("{")
    (tmp_path / "step-00000003" / "more").mkdir()
    (tmp_path / "backup").mkdir()
    assert prunable(tmp_path, keep=2) == []
    assert steps(prunable(tmp_path, keep=1)) == [4]


def test_a_damaged_validation_loss_is_not_the_best(tmp_path: Path) -> None:
    for step, val_loss in [(1, 1.5), (2, 2.5), (3, None)]:
        make(tmp_path, step=step, val_loss=val_loss)
    state = tmp_path / "step-00000002" / "train.json"
    state.write_text(state.read_text().replace("2.5", "0.5"))
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000001"
    assert steps(prunable(tmp_path, keep=1)) == [2]


def test_the_message_of_a_full_disk_has_two_different_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message shows less free space than the checkpoint takes, for small checkpoints too."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=900 * 2**10))
    with pytest.raises(StorageError, match=r" has 0\.8 MiB free and a checkpoint takes 1\.1 MiB with 1 MiB to spare: "):
        require_space(tmp_path, 50_000)
