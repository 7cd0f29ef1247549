"""Damage, broken chains and wrong weights of a run are found. tests/end_to_end verifies runs of the real command."""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distgpt import verify
from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.manifest import MANIFEST, checkpoint_path, manifest_bytes, read_manifest, read_origin
from distgpt.cli import verify_options
from distgpt.config import resolve, to_toml
from distgpt.corpus.shards import Dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, UsageError
from distgpt.training.rerun import Rerun, Start
from tests import jobs
from tests.checkpoint.checkpoints import SMALL, OnlyRun

ONE_PROCESS = Runtime(0, 0, 1, 1, torch.device("cpu"))
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def train(run: Path, dataset: Dataset, *, flip_after: int = 0) -> None:
    """Train 8 steps in this process and save steps 2, 5, 7 and 8. A bit of a weight flips after a step."""
    config = resolve(
        [
            *(*SMALL, f"--data.path={dataset.path}", "--train.global_batch=4", "--train.micro_batch=2"),
            *("--train.dtype=float32", "--train.steps=8", "--model.dropout=0.2", "--checkpoint.keep=9"),
        ],
        {},
    )
    with closing(Rerun(Start(config, 1), ONE_PROCESS, dataset)) as rerun:
        checkpointer = Checkpointer(OnlyRun(run), config, rerun.plan, dataset, rerun.state)
        for step in range(1, 9):
            rerun.take_steps(step)
            if step in (2, 5, 7, 8):
                checkpointer.save(step, val_loss=None)
                checkpointer.require_saved(step)
            if step == flip_after:
                weight = rerun.model.get_parameter("blocks.0.mlp.up.weight").detach()
                weight.view(torch.int32)[0, 0] ^= 1
    (run / "config.toml").write_text(to_toml(config))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products are slow on several threads."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest run. Copy it before changing it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    train(run, dataset)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def at(run: Path, step: int) -> Path:
    return checkpoint_path(run / "checkpoints", step)


def verified(run: Path, *options: str) -> None:
    verify.main(*verify_options([str(run), *options]))


def test_an_honest_run_is_good(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verified(trained)
    heading, *rows, last = capsys.readouterr().out.splitlines()
    assert heading.split() == ["checkpoint", "size", "files", "chain", "data", "code", "config"]
    assert [row.split("  ")[0] for row in rows] == jobs.checkpoints(trained)
    assert "whole  first of its run  same  same  same" in rows[0]
    assert "whole  after step 2      same  same  same" in rows[1]
    assert last == "good: 4 checkpoints, whole and as stated"


def test_what_cannot_be_checked_is_said(
    run: Path, tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint that was removed, one of an older distgpt, other values in config.toml, data that is elsewhere."""
    shutil.rmtree(at(run, 2))
    files = read_manifest(at(run, 8))
    (at(run, 8) / MANIFEST).write_bytes(manifest_bytes(files, None))
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("steps = 8", "steps = 9").replace(str(dataset.path), "/gone"))
    verified(run)
    *_, five, seven, eight, last = capsys.readouterr().out.splitlines()
    assert "after step 2, which is gone  same  same  data.path" in five
    assert five.endswith("train.steps 8 -> 9")
    assert "after step 5  " in seven
    assert "without a chain              same  -     " in eight
    assert last == (
        "good: 3 checkpoints, whole and as stated; 1 without a chain; 1 after one that is gone, which cannot be checked"
    )
    origin = read_origin(at(run, 7))
    assert origin is not None
    (at(run, 7) / MANIFEST).write_bytes(manifest_bytes(read_manifest(at(run, 7)), replace(origin, code="older")))
    verified(at(run, 7), "--json")
    report = json.loads(capsys.readouterr().out)
    assert [(c["checkpoint"], c["code"]) for c in report["checkpoints"]] == [("step-00000007", "other")]


@pytest.mark.parametrize(
    "wrong", ["a flipped bit", "an empty manifest", "a foreign checkpoint", "another model", "other data"]
)
def test_a_run_that_is_not_what_it_states_is_refused(
    run: Path, dataset: Dataset, other_dataset: Dataset, tmp_path: Path, wrong: str
) -> None:
    options: tuple[str, ...] = ()
    match wrong:
        case "a flipped bit":
            content = bytearray((at(run, 5) / "__0_0.distcp").read_bytes())
            content[1000] ^= 1
            (at(run, 5) / "__0_0.distcp").write_bytes(content)
            expected = "^step-00000005: __0_0.distcp does not match its hash$"
        case "an empty manifest":
            (at(run, 8) / MANIFEST).write_bytes(manifest_bytes({}, read_origin(at(run, 8))))
            expected = r"^step-00000008: manifest.json does not list .metadata \(and 2 more"
        case "a foreign checkpoint":
            train(tmp_path / "other", dataset, flip_after=1)
            shutil.rmtree(at(run, 5))
            shutil.copytree(at(tmp_path / "other", 5), at(run, 5))
            expected = r"^step-00000005: step 5 states that it follows step 2, but not this one: .* \(and 1 more: see"
        case "another model":
            config = (run / "config.toml").read_text()
            (run / "config.toml").write_text(config.replace("n_layer = 1", "n_layer = 2"))
            expected = r"^step-00000002: config.toml is of another run: model.n_layer 1 -> 2 \(and 3 more"
        case _:
            options = ("--data", str(other_dataset.path))
            expected = r"^step-00000002: the data is not what it was trained on \(and 3 more"
    with pytest.raises(DataError, match=expected):
        verified(run, *options)


def test_steps_taken_again_give_the_same_bits(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replayed = []
    for options in (("--replay=1",), ("--replay=3", "--checkpoint=5"), ("--replay=3", "--checkpoint=2")):
        verified(trained, *options)
        replayed.append(capsys.readouterr().out.splitlines()[-2])
    assert [line.partition(" on ")[0] for line in replayed] == [
        *("replayed: steps 8 to 8", "replayed: steps 6 to 7", "replayed: steps 3 to 5"),
    ]
    with pytest.raises(UsageError, match="nothing to replay: the next checkpoint is 3 steps later: take --replay 3"):
        verified(trained, "--replay=2", "--checkpoint=2")
    with pytest.raises(UsageError, match="nothing to replay: no checkpoint is here with the one that it follows"):
        verified(trained, "--replay=2", "--checkpoint=8")


def test_the_first_steps_are_taken_again_from_the_initial_weights(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 7, 8):
        shutil.rmtree(at(run, step))
    verified(run, "--replay=2")
    assert capsys.readouterr().out.splitlines()[-2].startswith("replayed: steps 1 to 2 on 1 rank give the same bits")


def test_a_flipped_bit_of_a_weight_in_memory_is_found(dataset: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, dataset, flip_after=6)
    verified(run)  # all files are whole
    verified(run, "--replay=3", "--checkpoint=2")
    verified(run, "--replay=1")
    problem = "steps 6 to 7, taken again, do not lead to step-00000007: .* such as model.blocks.0"
    with pytest.raises(DataError, match=problem):
        verified(run, "--replay=2", "--checkpoint=5")
