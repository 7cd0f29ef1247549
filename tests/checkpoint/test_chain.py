"""Each checkpoint states what it was made from, and which one it follows."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distgpt.checkpoint import chain
from distgpt.checkpoint.chain import code_sha256, config_sha256, find_break
from distgpt.checkpoint.manifest import (
    MANIFEST,
    Link,
    checkpoint_path,
    find_damage,
    manifest_bytes,
    read_manifest,
    read_origin,
    read_state,
    sha256_of,
)
from distgpt.corpus.shards import Dataset
from tests.checkpoint.checkpoints import ORIGIN, newest, sign_again, trainee

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def link_to(run: Path, step: int) -> Link:
    return Link(step, sha256_of(checkpoint_path(run / "checkpoints", step) / MANIFEST))


def save(run: Path, dataset: Dataset, step: int) -> Link | None:
    """Go on with a run, save a step, and return what it follows."""
    subject = trainee(run, dataset)
    subject.checkpointer.restore()
    subject.checkpointer.save(step, val_loss=None)
    subject.checkpointer.require_saved(step)
    origin = read_origin(newest(run))
    assert origin is not None
    return origin.previous


def test_a_checkpoint_states_what_it_was_made_from(saved: Path, dataset: Dataset) -> None:
    first, second = (read_origin(checkpoint_path(saved / "checkpoints", step)) for step in (1, 2))
    assert first is not None
    assert second is not None
    assert (first.previous, second.previous) == (None, link_to(saved, 1))
    assert replace(first, previous=second.previous) == second
    assert second.config == config_sha256(read_state(newest(saved)).config)
    assert (second.data, second.code) == (dataset.fingerprint, code_sha256())


def test_a_run_that_goes_on_follows_what_it_was_resumed_from(run: Path, dataset: Dataset) -> None:
    followed = link_to(run, 2)
    assert save(run, dataset, 3) == followed
    (newest(run) / "tokenizer.json").write_text("damaged")
    assert save(run, dataset, 4) == followed


def test_an_old_checkpoint_without_an_origin_can_be_followed(run: Path, dataset: Dataset) -> None:
    (newest(run) / MANIFEST).write_bytes(manifest_bytes(read_manifest(newest(run)), None))
    assert json.loads((newest(run) / MANIFEST).read_text())["format_version"] == 1
    assert (find_damage(newest(run)), read_origin(newest(run))) == ([], None)
    assert save(run, dataset, 3) == link_to(run, 2)


@pytest.mark.parametrize(
    "origin",
    [
        None,
        {},
        {"previous": 3},
        {"code": 3},
        {"more": ""},
        {"previous": {"step": -1, "sha256": ""}},
        {"previous": {"step": 1.0, "sha256": ""}},
        {"previous": {"step": 1, "sha256": []}},
    ],
)
def test_an_origin_that_no_run_writes_is_damage(run: Path, origin: dict[str, Any] | None) -> None:
    manifest = json.loads((newest(run) / MANIFEST).read_text())
    manifest["origin"] = {**manifest["origin"], **origin} if origin else origin
    (newest(run) / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(AssertionError):
        sign_again(newest(run))
    assert MANIFEST in find_damage(newest(run))[0]


@pytest.mark.parametrize(
    ("previous", "manifests", "broken"),
    [
        (None, {7: "own"}, ""),
        (Link(5, "five"), {5: "five", 7: "own"}, ""),
        (Link(5, "five"), {2: "two", 7: "own", 9: "nine"}, ""),  # step 5 was removed
        (Link(5, "five"), {5: "another", 7: "own"}, "follows step 5, but not this one"),
        (Link(5, "five"), {5: "five", 6: "six", 7: "own"}, "follows step 5, but there is step 6"),
        (None, {0: "zero", 7: "own"}, "follows no other, but there is step 0"),
        (Link(7, "own"), {7: "own"}, "follows step 7"),
    ],
)
def test_a_break_of_the_chain_is_found(previous: Link | None, manifests: dict[int, str], broken: str) -> None:
    found = find_break(7, replace(ORIGIN, previous=previous), manifests)
    assert (broken in found, bool(found)) == (True, bool(broken))


def test_the_hash_of_the_code_depends_on_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "distgpt", SimpleNamespace(__file__=str(tmp_path / "__init__.py")))
    hashes = set()
    for name, content in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("room/c.toml", "")):
        (tmp_path / "room").mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        (tmp_path / "notes.txt").write_text(name)
        hashes.add(code_sha256.__wrapped__())
    (tmp_path / "notes.txt").write_text("no code")
    assert len(hashes) == 4
    assert code_sha256.__wrapped__() in hashes
