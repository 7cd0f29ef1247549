"""Old checkpoints go; nothing that is still wanted, and nothing that is not ours, is lost."""

import json
from pathlib import Path

from distgpt.cluster.retention import best_of, prune


def make(directory: Path, *, step: int, val_loss: float | None) -> Path:
    """A checkpoint without tensors, enough to prune."""
    made = directory / f"step-{step:08d}"
    made.mkdir(parents=True)
    state = {"step": step, "val_loss": val_loss, "config": {}, "data_fingerprint": "", "tokenizer_sha256": ""}
    (made / "train.json").write_text(json.dumps({**state, "vocab_size": 1, "eot_id": None}))
    (made / "manifest.json").write_text(json.dumps({"files": {"train.json": {}}}))
    return made


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step, val_loss in [(1, 3.0), (2, 1.5), (3, None), (4, 2.0), (5, 1.6), (6, None)]:
        make(tmp_path, step=step, val_loss=val_loss)
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000005", "step-00000006"]
    prune(tmp_path, keep=2)
    assert len(list(tmp_path.iterdir())) == 3
    make(tmp_path, step=7, val_loss=1.0)
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]
    assert best_of(tmp_path) == tmp_path / "step-00000007"


def test_prune_leaves_what_it_did_not_write(tmp_path: Path) -> None:
    for step in range(1, 6):
        make(tmp_path, step=step, val_loss=None)
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000002" / "manifest.json").write_text("{")
    (tmp_path / "step-00000003" / "more").mkdir()
    (tmp_path / "backup").mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    prune(tmp_path, keep=1)
    assert not (tmp_path / "step-00000004").exists()
    assert (tmp_path / "step-00000001" / "notes.txt").read_text() == "mine"
