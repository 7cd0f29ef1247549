"""Checkpoints of one process: saves are restored, damage is skipped, and a full disk costs one checkpoint only.

Saving and resuming over several ranks, and across strategies, is in tests/end_to_end/test_resume.py.
"""

import json
import math
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.staging import DefaultStager

from distgpt.checkpoint import store
from distgpt.checkpoint.compatibility import require_same_run
from distgpt.checkpoint.manifest import committed, read_state
from distgpt.checkpoint.reader import load_for_inference
from distgpt.checkpoint.store import Store, require_writable
from distgpt.config import resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, DirectoryError, StorageError, UsageError
from distgpt.health.outliers import OutlierFilter
from tests import jobs
from tests.checkpoint.checkpoints import CPU, FILES, SMALL, flip_bit, names, newest, sign_again, trainee
from tests.datasets import make_dataset

ONE_PROCESS = Runtime(0, 0, 1, 1, CPU)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# What was saved is restored.


def test_model_and_optimizer_are_restored_bit_for_bit(saved: Path, dataset: Dataset) -> None:
    original, restored = trainee(saved, dataset), trainee(saved, dataset)
    for _ in range(2):
        original.learn()
    assert restored.checkpointer.restore() == 2
    assert restored.messages == []
    # The next step depends on the moments and the step counts of AdamW too.
    for subject in (original, restored):
        subject.learn()
    for (name, a), b in zip(original.model.named_parameters(), restored.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(original.model.parameters(), restored.model.parameters(), strict=True):
        states = original.optimizer.state[a], restored.optimizer.state[b]
        assert states[0].keys() == states[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_muon_is_restored_bit_for_bit(tmp_path: Path, dataset: Dataset) -> None:
    original, restored = (trainee(tmp_path, dataset, "--optim.name=muon") for _ in range(2))
    original.learn()
    original.checkpointer.save(1, val_loss=None)
    original.checkpointer.require_saved(1)
    assert restored.checkpointer.restore() == 1
    for subject in (original, restored):
        subject.learn()
    for (name, a), b in zip(original.model.named_parameters(), restored.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        states = original.optimizer.state[a], restored.optimizer.state[b]
        assert states[0].keys() == states[1].keys()
        assert ("momentum" in states[0]) == (name.startswith("blocks.") and a.ndim == 2)
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_hyper_parameters_come_from_the_config_and_not_from_the_checkpoint(saved: Path, dataset: Dataset) -> None:
    subject = trainee(saved, dataset, "--optim.lr=0.5", "--optim.weight_decay=0.25")
    subject.checkpointer.restore()
    assert {group["lr"] for group in subject.optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in subject.optimizer.param_groups} == {0.25, 0.0}


def test_a_checkpoint_holds_everything_needed_to_resume(saved: Path, dataset: Dataset) -> None:
    assert names(saved) == ["step-00000001", "step-00000002"]
    assert sorted(file.name for file in newest(saved).iterdir()) == sorted(FILES)
    state = read_state(newest(saved))
    assert (state.step, state.val_loss, state.vocab_size) == (2, 5.0, dataset.vocab_size)
    assert state.data_fingerprint == dataset.fingerprint
    assert state.config["model"]["n_embd"] == 16
    assert trainee(saved, dataset).checkpointer.best_val_loss() == 4.0


def test_a_checkpoint_keeps_the_tokenizer_that_training_began_with(tmp_path: Path) -> None:
    """Meanwhile the directory of the data may hold another dataset, or none."""
    (tmp_path / "data").mkdir()
    dataset = make_dataset(tmp_path / "data", seed=0)
    tokenizer = dataset.path / "tokenizer.json"
    original = tokenizer.read_bytes()
    subject = trainee(tmp_path / "run", dataset)
    tokenizer.unlink()
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.require_saved(1)
    assert (newest(tmp_path / "run") / "tokenizer.json").read_bytes() == original

    tokenizer.write_bytes(original.replace(b"a", b"b"))
    with pytest.raises(DataError, match=r"tokenizer.json is not the one that the data was prepared with"):
        trainee(tmp_path / "run", dataset)
    (newest(tmp_path / "run") / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    sign_again(newest(tmp_path / "run"))
    with pytest.raises(DataError, match=r"tokenizer.json is not the one that the model was trained with"):
        load_for_inference(tmp_path / "run", CPU)


def test_a_directory_that_is_not_writable_is_noticed_before_the_first_save(tmp_path: Path) -> None:
    require_writable(tmp_path / "run" / "checkpoints")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(DirectoryError, match=r"cannot write to .*/file \(File exists\): choose another --run.dir"):
        require_writable(tmp_path / "file")
    with jobs.disk(tmp_path / "disk", "size=1m") as disk:
        (disk / "checkpoints").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(DirectoryError, match=r"\(Read-only file system\)"):
            require_writable(disk / "checkpoints")
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        jobs.fill(disk / "filler")
        require_writable(disk / "checkpoints")  # there may be room by the first save


def test_a_run_without_checkpoints_starts_at_step_0(tmp_path: Path, dataset: Dataset) -> None:
    subject = trainee(tmp_path, dataset)
    assert subject.checkpointer.restore() == 0
    assert subject.checkpointer.best_val_loss() is None
    with pytest.raises(DataError, match=f"{tmp_path} holds no checkpoint: train one"):
        load_for_inference(tmp_path, CPU)


@pytest.mark.parametrize("later", ["learn", "nothing"])
def test_saves_in_the_background_and_at_once_are_equal(tmp_path: Path, dataset: Dataset, later: str) -> None:
    for kind in ("true", "false"):
        subject = trainee(tmp_path / kind, dataset, f"--checkpoint.async_save={kind}")
        subject.learn()
        subject.checkpointer.save(1, val_loss=None)
        if later == "learn":  # later training must not change what is written
            for _ in range(20):
                subject.learn()
        subject.checkpointer.require_saved(1)
        assert subject.messages == []
    jobs.assert_same_tensors(newest(tmp_path / "true"), newest(tmp_path / "false"))


def test_every_save_is_staged_in_the_same_memory(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = trainee(tmp_path, dataset)
    staged, copies = list[Any](), list[Any]()
    stage = StateDictStager.stage

    def spy(stager: StateDictStager, tensors: dict[str, Any], **options: Any) -> object:
        copies.append(stage(stager, tensors, **options))
        staged.append(tensors)
        return copies[-1]

    monkeypatch.setattr(StateDictStager, "stage", spy)
    for step in (1, 2, 3):
        subject.learn()
        subject.checkpointer.save(step, val_loss=None)
    subject.checkpointer.require_saved(3)
    for part in ("model", "optim"):
        for name, tensor in copies[0][part].items():
            addresses = {copy[part][name].untyped_storage().data_ptr() for copy in copies}
            assert addresses == {tensor.untyped_storage().data_ptr()}, name
            assert addresses.isdisjoint({staged[0][part][name].untyped_storage().data_ptr()})


# Damaged checkpoints are skipped.


@pytest.mark.parametrize("name", FILES)
def test_restore_falls_back_to_the_newest_good_one(run: Path, dataset: Dataset, name: str) -> None:
    flip_bit(newest(run) / name, random.Random(0))
    assert load_for_inference(run, CPU)[2].step == 1
    subject = trainee(run, dataset)
    assert subject.checkpointer.restore() == 1
    assert len(subject.messages) == 1
    assert subject.messages[0].startswith("going on from step-00000001; skipped step-00000002: ")
    assert f"{name} " in subject.messages[0]
    kept, broken = sorted(names(run), reverse=True)
    assert kept == "step-00000001"
    assert broken.startswith("broken-step-00000002-")
    # The step can be saved again, and the broken one is neither read nor pruned.
    subject.learn()
    for step in (2, 3, 4):
        subject.checkpointer.save(step, val_loss=None)
    subject.checkpointer.require_saved(4)
    assert trainee(run, dataset).checkpointer.restore() == 4
    assert broken in names(run)


def test_restore_fails_if_all_checkpoints_are_damaged(run: Path, dataset: Dataset) -> None:
    before = names(run)
    for directory in committed(run / "checkpoints"):
        flip_bit(directory / "__0_0.distcp", random.Random(0))
    for load in (lambda: trainee(run, dataset).checkpointer.restore(), lambda: load_for_inference(run, CPU)):
        with pytest.raises(DataError) as caught:
            load()
        assert "holds no whole checkpoint (step-00000002: __0_0.distcp does not match its hash" in str(caught.value)
        assert "step-00000001: __0_0.distcp does not match" in str(caught.value)
    assert names(run) == before  # for the user to look at


def test_saving_prunes_and_keeps_the_best(tmp_path: Path, dataset: Dataset) -> None:
    subject = trainee(tmp_path, dataset)
    for step, val_loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, None)]:
        subject.learn()
        subject.checkpointer.save(step, val_loss=val_loss)
    subject.checkpointer.require_saved(5)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_left_overs_of_a_kill_are_cleaned_and_never_read(run: Path, dataset: Dataset) -> None:
    checkpoints = run / "checkpoints"
    staging = checkpoints / ".staging-000001-there-1"
    staging.mkdir()
    newest(run).rename(staging / "step-00000002")
    (staging / "step-00000009").mkdir()
    (staging / "step-00000009" / "__0_0.distcp").write_bytes(b"half")
    subject = trainee(run, dataset)
    assert subject.checkpointer.restore() == 1
    assert subject.messages == []
    assert names(run) == ["step-00000001"]
    subject.checkpointer.save(2, val_loss=None)
    subject.checkpointer.require_saved(2)
    assert names(run) == ["step-00000001", "step-00000002"]


def test_nothing_is_removed_after_a_save_that_is_already_damaged(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Store.commit

    def damaging(self: Store, step: int, *rest: Any) -> None:
        commit(self, step, *rest)
        if step > 2:
            flip_bit(newest(tmp_path) / "__0_0.distcp", random.Random(0))

    monkeypatch.setattr(Store, "commit", damaging)
    subject = trainee(tmp_path, dataset, "--checkpoint.keep=1")
    for step in (1, 2, 3, 4):
        subject.learn()
        subject.checkpointer.save(step, val_loss=None)
    with pytest.raises(StorageError, match=r"step 4 could not be saved in .*: the newest checkpoint is step-00000003"):
        subject.checkpointer.require_saved(4)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    assert [line.split(" is damaged")[0].split("/")[-1] for line in subject.messages] == [
        "step-00000003",
        "step-00000004",
    ]
    assert trainee(tmp_path, dataset).checkpointer.restore() == 2
    # The newest damaged one is kept for inspection.
    kept, broken = sorted(names(tmp_path), reverse=True)
    assert kept == "step-00000002"
    assert broken.startswith("broken-step-00000004-")


def test_files_that_a_user_put_into_a_broken_checkpoint_stay(run: Path, dataset: Dataset) -> None:
    older = run / "checkpoints" / "broken-step-00000002-1"
    older.mkdir()
    (older / "notes.txt").write_text("mine")
    flip_bit(newest(run) / "__0_0.distcp", random.Random(0))
    assert trainee(run, dataset).checkpointer.restore() == 1
    assert older.name in names(run)
    assert len(names(run)) == 3


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with jobs.disk(tmp_path / "disk", "size=4m") as disk:
        yield disk


@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    small_disk: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, noticed: str
) -> None:
    if noticed == "while writing":  # the disk fills up after the check
        monkeypatch.setattr(store, "require_space", lambda directory, needed: None)
    subject = trainee(small_disk, dataset)
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.require_saved(1)
    jobs.fill(small_disk / "filler")
    subject.learn()
    subject.checkpointer.save(2, val_loss=None)
    subject.checkpointer.wait()
    (line,) = subject.messages
    assert line.startswith("CHECKPOINT NOT SAVED, training goes on: ")
    assert ("MiB free and a checkpoint takes" if noticed == "before" else "No space left on device") in line
    assert names(small_disk) == ["step-00000001"]
    with pytest.raises(StorageError, match=r"step 2 could not be saved in .*: the newest checkpoint is step-00000001"):
        subject.checkpointer.require_saved(2)
    (small_disk / "filler").unlink()
    subject.checkpointer.save(3, val_loss=None)
    subject.checkpointer.require_saved(3)
    assert names(small_disk) == ["step-00000001", "step-00000003"]
    assert trainee(small_disk, dataset).checkpointer.restore() == 3


# Checkpoints of another run.


def test_the_same_run_may_go_on_with_other_speed_and_length(saved: Path, dataset: Dataset) -> None:
    free = ("--train.steps=9", "--train.micro_batch=1", "--model.loss_chunk=4", "--parallel.strategy=fsdp")
    require_same_run(saved / "checkpoints", resolve([*SMALL, *free, "--optim.lr=1"], {}), dataset, replicas=1)
    require_same_run(saved / "none", resolve([], {}), dataset, replicas=1)


def test_another_run_is_refused_with_a_diff(saved: Path, other_dataset: Dataset) -> None:
    other = ("--model.n_layer=3", "--model.mlp=gelu", "--run.seed=7", "--train.global_batch=8")
    with pytest.raises(UsageError) as caught:
        require_same_run(saved / "checkpoints", resolve([*SMALL, *other], {}), other_dataset, replicas=1)
    message = str(caught.value)
    assert message.startswith(f"{saved / 'checkpoints' / 'step-00000002'} was made by another run: ")
    for difference in (
        *("model.n_layer 1 -> 3", "model.mlp relu -> gelu", "run.seed 1337 -> 7", "train.global_batch 64 -> 8"),
        f"-> {other_dataset.fingerprint[:12]} ({other_dataset.path})",
    ):
        assert difference in message
    assert "n_embd" not in message
    assert "vocabulary" not in message
    assert "\n" not in message


def test_a_run_keeps_its_optimizer_which_was_adamw_before_there_was_another(run: Path, dataset: Dataset) -> None:
    for checkpoint in committed(run / "checkpoints"):
        state = json.loads((checkpoint / "train.json").read_text())
        del state["config"]["optim"]["name"]
        (checkpoint / "train.json").write_text(json.dumps(state))
        sign_again(checkpoint)
    require_same_run(run / "checkpoints", resolve(SMALL, {}), dataset, replicas=1)
    with pytest.raises(UsageError, match=r"was made by another run: optim.name adamw -> muon; resume with"):
        require_same_run(run / "checkpoints", resolve([*SMALL, "--optim.name=muon"], {}), dataset, replicas=1)


def test_a_damaged_newest_checkpoint_does_not_hide_the_diff(run: Path, dataset: Dataset) -> None:
    (newest(run) / "train.json").write_text("{")
    with pytest.raises(UsageError, match=r"step-00000001 was made by another run: model.n_layer 1 -> 3;"):
        require_same_run(run / "checkpoints", resolve([*SMALL, "--model.n_layer=3"], {}), dataset, replicas=1)


# The outlier filter.


def test_the_outlier_filter_is_restored_and_old_checkpoints_may_lack_it(dataset: Dataset, tmp_path: Path) -> None:
    subject = trainee(tmp_path, dataset)
    for step in range(40):
        subject.outliers.check(loss=4.0 - step / 30, grad_norm=1 / (step + 3))
    subject.outliers.check(loss=math.nan, grad_norm=1.0)
    subject.checkpointer.save(40, val_loss=None)
    subject.checkpointer.require_saved(40)
    again = trainee(tmp_path, dataset)
    assert again.checkpointer.restore() == 40
    assert again.outliers.state() == subject.outliers.state()
    saved = newest(tmp_path)
    assert read_state(saved).micro_batch == 64

    state = json.loads((saved / "train.json").read_text())
    del state["guard"], state["micro_batch"]
    (saved / "train.json").write_text(json.dumps(state))
    sign_again(saved)
    assert again.checkpointer.restore() == 40
    assert again.outliers.state() == OutlierFilter(resolve([], {}).health).state()


def test_a_second_save_works_where_a_stager_stages_only_once(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The DefaultStager of torch 2.11 closes its resources after each copy."""
    staged = DefaultStager._stage  # noqa: SLF001

    def once(self: DefaultStager, *arguments: Any, **named: Any) -> Any:
        copied = staged(self, *arguments, **named)
        self._state_dict_stager.close()  # type: ignore[no-untyped-call]
        return copied

    monkeypatch.setattr(DefaultStager, "_stage", once)
    subject = trainee(tmp_path, dataset)
    for step in (1, 2):
        subject.learn()
        subject.checkpointer.save(step, val_loss=None)
    subject.checkpointer.require_saved(2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
