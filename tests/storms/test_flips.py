"""Flipped bits, cut and deleted files in checkpoints and prepared data: all damage is found and reported in one line.

An older good checkpoint is loaded instead of a damaged one. If there is none, or data is damaged, DataError is raised.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from distgpt.checkpoint.compatibility import require_same_run
from distgpt.checkpoint.manifest import committed
from distgpt.checkpoint.reader import load_for_inference
from distgpt.config import resolve
from distgpt.corpus.shards import Dataset, open_dataset, verify_dataset
from distgpt.errors import DataError
from tests import jobs
from tests.checkpoint.checkpoints import CPU, SMALL, flip_bit, trainee
from tests.storms.conftest import Storm, Table

pytestmark = pytest.mark.storm
TITLE = "Bits flipped, files cut short, files deleted"
UNREAD = ("train.bin", "val.bin", "meta.pkl")  # files for nanoGPT, which distgpt does not read


def cut(file: Path, draw: random.Random) -> None:
    with file.open("r+b") as stream:
        stream.truncate(draw.randrange(file.stat().st_size))


def delete(file: Path, draw: random.Random) -> None:
    file.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "bit flipped": flip_bit,
    "cut short": cut,
    "deleted": delete,
}


@pytest.fixture(scope="module")
def saved(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 1, 2 and 3."""
    run = tmp_path_factory.mktemp("saved") / "run"
    subject = trainee(run, dataset, "--checkpoint.keep=3")
    for step in (1, 2, 3):
        subject.learn()
        subject.checkpointer.save(step, val_loss=None)
    subject.checkpointer.require_saved(3)
    return run


def test_a_damaged_checkpoint_is_never_loaded(saved: Path, dataset: Dataset, storm: Storm, table: Table) -> None:
    """Damage one to three of three checkpoints, each in one file, and repair them again."""
    config = resolve([*SMALL, "--checkpoint.keep=3"], {})
    draw = random.Random(storm.seed)
    checkpoints = committed(saved / "checkpoints")
    found: Counter[tuple[str, str]] = Counter()
    for _ in range(storm.size(short=40, long=700)):
        damaged = draw.sample(checkpoints, draw.choice((1, 1, 2, 3)))
        damage = draw.choice(sorted(DAMAGES))
        whole = {}
        for checkpoint in damaged:
            file = draw.choice(sorted(checkpoint.iterdir()))
            whole[file] = file.read_bytes()
            DAMAGES[damage](file, draw)
        good = [checkpoint for checkpoint in checkpoints if checkpoint not in damaged]
        require_same_run(saved / "checkpoints", config, dataset, replicas=1)  # the first check of training
        where = [str(file) for file in whole]
        if good:
            step = load_for_inference(saved, CPU)[2].step
            assert step == int(good[0].name[5:]), where
            found[damage, "skipped" if good[0] != checkpoints[0] else "not the newest"] += 1
        else:
            with pytest.raises(DataError) as caught:
                load_for_inference(saved, CPU)
            assert caught.value.code == 65, where
            assert "\n" not in str(caught.value), where
            assert all(checkpoint.name in str(caught.value) for checkpoint in damaged), where
            found[damage, "refused"] += 1
        for file, content in whole.items():
            file.write_bytes(content)
    assert load_for_inference(saved, CPU)[2].step == 3
    for damage in DAMAGES:
        kinds = {kind: found[damage, kind] for kind in ("skipped", "not the newest", "refused", "unused")}
        table(TITLE, {"where": "checkpoints", "damage": damage, "strikes": sum(kinds.values()), **kinds, "missed": 0})


def test_damaged_data_is_refused(dataset: Dataset, tmp_path: Path, storm: Storm, table: Table) -> None:
    draw = random.Random(storm.seed)
    found: Counter[tuple[str, str]] = Counter()
    copy = Path(shutil.copytree(dataset.path, tmp_path / "data", ignore=shutil.ignore_patterns(".verified.json")))
    files = sorted(file for file in copy.iterdir() if file.name not in UNREAD)
    for _ in range(storm.size(short=20, long=300)):
        file, damage = draw.choice(files), draw.choice(sorted(DAMAGES))
        whole = file.read_bytes()
        DAMAGES[damage](file, draw)
        outcome = "refused"
        if file.name == "meta.json" and damage == "bit flipped":
            outcome = refused_or_unused(copy, dataset)
        else:
            with pytest.raises(DataError) as caught:
                verify_dataset(open_dataset(copy))
            assert caught.value.code == 65
            assert "\n" not in str(caught.value)
        found[damage, outcome] += 1
        file.write_bytes(whole)
        (copy / ".verified.json").unlink(missing_ok=True)
    verify_dataset(open_dataset(copy))
    for damage in DAMAGES:
        kinds = {
            "skipped": 0,
            "not the newest": 0,
            "refused": found[damage, "refused"],
            "unused": found[damage, "unused"],
        }
        table(TITLE, {"where": "prepared data", "damage": damage, "strikes": sum(kinds.values()), **kinds, "missed": 0})


def test_a_flipped_bit_in_meta_json_is_found_or_unused(
    dataset: Dataset, tmp_path: Path, storm: Storm, table: Table
) -> None:
    """Flip every bit of meta.json in the full storm, and those of the vocabulary size in the short one."""
    ignored = shutil.ignore_patterns(".verified.json")
    copy = Path(shutil.copytree(dataset.path, tmp_path / "data", ignore=ignored))
    meta = copy / "meta.json"
    whole = meta.read_bytes()
    key = whole.index(b'"vocab_size": ')
    start, stop = (0, len(whole)) if storm.full else (key, whole.index(b"\n", key))
    found: Counter[str] = Counter()
    for at in range(8 * start, 8 * stop):
        content = bytearray(whole)
        content[at // 8] ^= 1 << at % 8
        meta.write_bytes(content)
        found[refused_or_unused(copy, dataset)] += 1
        (copy / ".verified.json").unlink(missing_ok=True)
    assert found["refused"] > found["unused"]
    table("Bits of meta.json", {"flipped": found.total(), **{kind: found[kind] for kind in ("refused", "unused")}})


def refused_or_unused(copy: Path, dataset: Dataset) -> str:
    """Return the effect of a flipped bit in meta.json, which has no hash: it is found, or training does not use it."""
    try:
        opened = open_dataset(copy)
        verify_dataset(opened)
    except DataError:
        return "refused"
    assert (opened.fingerprint, opened.vocab_size) == (dataset.fingerprint, dataset.vocab_size)
    return "unused"


def test_a_command_reports_damaged_checkpoints_in_one_line(
    saved: Path, dataset: Dataset, tmp_path: Path, storm: Storm
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    draw = random.Random(storm.seed)
    for checkpoint in committed(run / "checkpoints"):
        flip_bit(draw.choice(sorted(checkpoint.iterdir())), draw)
    ended = jobs.command("sample", run)
    assert ended.code == 65, ended
    assert ended.stderr.count("\n") == 1, ended
    assert ended.error_lines == [ended.stderr.rstrip("\n")]
    assert "holds no whole checkpoint" in ended.stderr
