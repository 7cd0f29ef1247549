"""Replays of crafted checkpoints. tests/end_to_end replays real runs."""

import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distgpt import replay
from distgpt.config import resolve, to_toml
from distgpt.corpus.loader import Loader
from distgpt.corpus.shards import Dataset, open_dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, UsageError
from distgpt.run.paths import RunPaths
from distgpt.training import rerun
from tests import jobs
from tests.checkpoint.checkpoints import SMALL, Trainee, newest, trainee
from tests.datasets import make_dataset

ONE_PROCESS = Runtime(0, 0, 1, 1, torch.device("cpu"))
BATCH = ("--train.global_batch=4", "--train.micro_batch=2", "--train.dtype=float32", "--model.dropout=0.2")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def dataset(prepared: Path) -> Dataset:
    return open_dataset(prepared)


def arguments(dataset: Dataset) -> tuple[str, ...]:
    return (*BATCH, f"--data.path={dataset.path}", "--train.steps=9")


def saved_at_two(run: Path, dataset: Dataset, change: Callable[[Trainee], None], *more: str) -> None:
    """Save a checkpoint of step 2 whose weights were changed before."""
    subject = trainee(run, dataset, *arguments(dataset), *more)
    with torch.no_grad():
        change(subject)
    subject.checkpointer.save(2, val_loss=None)
    subject.checkpointer.require_saved(2)


def infinite(name: str, index: int = 0) -> Callable[[Trainee], None]:
    """Return a change that makes a weight of this parameter infinite, in row `index`."""

    def change(subject: Trainee) -> None:
        subject.model.get_parameter(name)[index, 0] = torch.inf

    return change


def replayed(run: Path, step: int, dataset: Dataset) -> None:
    replay.replay(rerun.start_before(RunPaths(run), step), step, ONE_PROCESS, dataset)


def third_step(dataset: Dataset) -> Loader:
    config = resolve([*SMALL, *BATCH], {})
    return Loader(
        dataset.train,
        block_size=config.model.block_size,
        global_batch=4,
        micro_batch=2,
        rank=0,
        world_size=1,
        seed=config.run.seed,
        device=ONE_PROCESS.device,
        start_step=2,
    )


def test_the_layer_is_named(tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    saved_at_two(tmp_path, dataset, infinite("blocks.0.mlp.down.weight"))
    replayed(tmp_path, 3, dataset)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "from      step-00000002, float32 on cpu",
        "weights   not finite in blocks.0.mlp.down.weight",
        "step 3    not finite, first in the forward pass of blocks.0.mlp.down: its output",
    ]
    assert lines[3].startswith("samples   8 to 9, micro-batch 1 of 2, as (shard, token offset): [(0, ")
    assert lines[4].startswith("replayed  loss nan | gradient norm nan")


def test_a_bad_token_is_traced_to_its_micro_batch_and_places(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(third_step(dataset)) as loader:
        (first_BT, _), (second_BT, _) = loader.next_step()
        shards, offsets = loader.places(2)
    token = next(token for token in second_BT.flatten().tolist() if token not in first_BT)
    saved_at_two(tmp_path, dataset, infinite("token_embedding.weight", token))
    replayed(tmp_path, 3, dataset)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "step 3    not finite, first in the forward pass of token_embedding: its output"
    places = list(zip(shards[2:].tolist(), offsets[2:].tolist(), strict=True))
    assert lines[3] == f"samples   10 to 11, micro-batch 2 of 2, as (shard, token offset): {places}"
    windows = [dataset.train.shards[shard][offset : offset + 8].tolist() for shard, offset in places]
    assert windows == second_BT.tolist()
    assert any(token in window for window in windows)


def test_an_earlier_step_that_would_end_the_run_ends_the_replay(tmp_path: Path, dataset: Dataset) -> None:
    saved_at_two(tmp_path, dataset, infinite("head.weight"))
    with pytest.raises(DataError, match=r"loss nan .* at step 3 already: replay that step with --step=3"):
        replayed(tmp_path, 5, dataset)


def test_a_replay_starts_from_an_older_checkpoint_if_the_newest_is_damaged_or_from_initial_weights(
    tmp_path: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunPaths(tmp_path)
    with pytest.raises(DataError, match=r"holds no run: neither a checkpoint before step 3 nor config.toml"):
        rerun.start_before(run, 3)
    run.config.write_text(to_toml(resolve([*SMALL, *arguments(dataset)], {})))
    saved_at_two(tmp_path, dataset, lambda subject: None)
    shutil.copytree(newest(tmp_path), tmp_path / "checkpoints" / "step-00000004")
    (tmp_path / "checkpoints" / "step-00000004" / "tokenizer.json").write_text("{}")
    start = rerun.start_before(run, 5)
    assert (start.step, start.checkpoint) == (2, tmp_path / "checkpoints" / "step-00000002")
    assert capsys.readouterr().out.startswith("skipped step-00000004: tokenizer.json has 2 bytes, not ")
    # A replay moves nothing aside.
    assert jobs.checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    assert rerun.start_before(run, 4).step == 2
    start = rerun.start_before(run, 2)
    assert (start.step, start.checkpoint) == (0, None)
    replayed(tmp_path, 2, dataset)
    assert "from      the initial weights, float32 on cpu\n" in capsys.readouterr().out


def test_a_step_has_the_config_of_the_attempt_that_took_it(tmp_path: Path, dataset: Dataset) -> None:
    """The run was resumed from step 2 with other values."""
    saved_at_two(tmp_path, dataset, lambda subject: None)
    run = RunPaths(tmp_path)
    assert rerun.start_before(run, 3).config.train.steps == 9  # without config.toml, the config of the checkpoint
    run.config.write_bytes(b"\xff")
    assert rerun.start_before(run, 3).config.train.steps == 9
    later = ("--train.steps=20", "--optim.lr=0.5", "--train.micro_batch=1")
    run.config.write_text(to_toml(resolve([*SMALL, *arguments(dataset), *later], {})))
    before, after = (rerun.start_before(run, step).config for step in (2, 3))
    assert (before.train.steps, before.optim.lr != 0.5, before.train.micro_batch) == (9, True, 2)
    assert (after.train.steps, after.optim.lr, after.train.micro_batch) == (20, 0.5, 1)


def test_other_data_is_refused(tmp_path: Path, dataset: Dataset) -> None:
    saved_at_two(tmp_path, dataset, lambda subject: None)
    start = rerun.start_before(RunPaths(tmp_path), 3)
    assert rerun.open_data(start, None).fingerprint == dataset.fingerprint
    moved = shutil.copytree(dataset.path, tmp_path / "moved")
    assert rerun.open_data(start, str(moved)).path == moved
    (tmp_path / "other").mkdir()
    other = make_dataset(tmp_path / "other", seed=0)
    with pytest.raises(DataError, match=r"/other is not the data that the run was trained on: say where .* --data=DIR"):
        rerun.open_data(start, str(other.path))
    gone = rerun.Start(resolve([f"--data.path={tmp_path / 'gone'}"], {}), 1)
    with pytest.raises(DataError, match=r"the run's data is not in \S+/gone any more: say where it is with --data=DIR"):
        rerun.open_data(gone, None)


def test_a_replay_starts_from_the_chosen_checkpoint(tmp_path: Path, dataset: Dataset) -> None:
    saved_at_two(tmp_path, dataset, lambda subject: None)
    start = rerun.start_from(newest(tmp_path), RunPaths(tmp_path), 3)
    assert (start.step, start.checkpoint, start.config.train.steps) == (2, newest(tmp_path), 9)
    with pytest.raises(UsageError, match="step-00000002 is of step 2: to replay step 2, choose one before it"):
        rerun.start_from(newest(tmp_path), RunPaths(tmp_path), 2)


def test_groups_that_these_ranks_cannot_form_become_one() -> None:
    grouped = resolve([*SMALL, "--parallel.strategy=hsdp", "--parallel.shard=2"], {})
    found = {
        ranks: rerun.config_here(rerun.Start(grouped, 1), replace(ONE_PROCESS, world_size=ranks)).parallel.strategy
        for ranks in (2, 3, 4)
    }
    assert found == {2: "hsdp", 3: "fsdp", 4: "hsdp"}
