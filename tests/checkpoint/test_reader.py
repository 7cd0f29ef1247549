"""Load models from the checkpoints of a run. Code in a checkpoint is never run."""

import errno
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distgpt.checkpoint import reader
from distgpt.checkpoint.choice import choose
from distgpt.checkpoint.manifest import committed
from distgpt.checkpoint.reader import load_for_inference
from distgpt.corpus.shards import Dataset
from distgpt.errors import DataError, StorageError, UsageError
from distgpt.training.startup import open_data_of_run
from tests.checkpoint.checkpoints import CPU, newest, sign_again, trainee

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_sampling_loads_the_newest_in_eval_mode(saved: Path, dataset: Dataset) -> None:
    model, tokenizer, state = load_for_inference(saved, CPU)
    subject = trainee(saved, dataset)
    subject.checkpointer.restore()
    assert state.step == 2
    assert not model.training
    assert tokenizer.decode([3, 4]) == "ab"[:2] or tokenizer.vocab_size == dataset.vocab_size
    for (name, a), b in zip(model.named_parameters(), subject.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_skipped_checkpoints_are_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (newest(run) / "__0_0.distcp").unlink()
    _, _, state = load_for_inference(run, CPU)
    assert state.step == 1
    (line,) = capsys.readouterr().err.splitlines()
    older = run / "checkpoints" / "step-00000001"
    assert line.startswith(f"distgpt: reading {older}; skipped step-00000002: __0_0.distcp: ")


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_crafted_index_runs_no_code(run: Path, dataset: Dataset, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "ran"
    payload = pickle.dumps(Payload(f"touch {marker}"), protocol=protocol)
    pickle.loads(payload)
    assert marker.exists()  # the payload works
    marker.unlink()
    for directory in committed(run / "checkpoints"):
        (directory / ".metadata").write_bytes(payload)
        sign_again(directory)
    with pytest.raises(DataError, match=r"\.metadata is not a valid checkpoint index: it asks for posix.system"):
        load_for_inference(run, CPU)
    with pytest.raises(DataError, match=r"\.metadata is not a valid checkpoint index"):
        trainee(run, dataset).checkpointer.restore()
    assert not marker.exists()


def test_a_disk_that_fails_while_tensors_are_read_is_a_storage_error(
    run: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reader, "open_file", failing)
    with pytest.raises(StorageError, match=r"step-00000002 cannot be read: .*Input/output error"):
        trainee(run, dataset).checkpointer.restore()


@pytest.mark.parametrize("content", [b"", b"\x80", b"junk", pickle.dumps({"a": 1}), pickle.dumps(3)])
def test_an_invalid_index_is_refused(run: Path, content: bytes) -> None:
    (newest(run) / ".metadata").write_bytes(content)
    sign_again(newest(run))
    with pytest.raises(DataError, match=r"\.metadata is not a valid checkpoint index"):
        load_for_inference(run, CPU)


def test_other_data_is_used_only_if_it_is_given(dataset: Dataset, other_dataset: Dataset) -> None:
    recorded, other = str(dataset.path), str(other_dataset.path)
    assert open_data_of_run(recorded, None, fingerprint=dataset.fingerprint).path == dataset.path
    assert open_data_of_run(recorded, other, fingerprint=None).path == other_dataset.path
    with pytest.raises(DataError, match=r"is not the data that the run was trained on: say where that is with --data="):
        open_data_of_run(other, None, fingerprint=dataset.fingerprint)
    with pytest.raises(DataError, match=r"the run's data is not in gone any more: say where it is with --data=DIR"):
        open_data_of_run("gone", None, fingerprint=dataset.fingerprint)


@pytest.mark.parametrize(
    ("choice", "step"),
    [("best", 1), ("newest", 2), ("1", 1), ("step-00000002", 2), ("{}/checkpoints/step-00000001", 1)],
)
def test_the_best_the_newest_and_any_other_checkpoint_can_be_chosen(saved: Path, choice: str, step: int) -> None:
    checkpoint = choose(saved, choice.format(saved))
    assert checkpoint == saved / "checkpoints" / f"step-{step:08d}"
    assert choose(checkpoint) == checkpoint
    assert load_for_inference(saved, CPU, choice.format(saved))[2].step == step


def test_a_checkpoint_is_known_by_its_own_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a link or "." does not matter, and a run may have a name like that of a checkpoint."""
    checkpoint = saved / "checkpoints" / "step-00000001"
    (tmp_path / "link").symlink_to(checkpoint)
    assert choose(tmp_path / "link") == checkpoint.resolve()
    monkeypatch.chdir(checkpoint)
    assert choose(Path()) == checkpoint.resolve()
    (tmp_path / "step-decay").symlink_to(saved)
    assert choose(tmp_path / "step-decay").name == "step-00000002"
    shutil.copytree(checkpoint, tmp_path / "mine")
    with pytest.raises(DataError, match=r"mine has no step in its name: give it its original name, such as"):
        load_for_inference(tmp_path / "mine", CPU)


def test_a_choice_that_does_not_exist_is_refused(run: Path, tmp_path: Path) -> None:
    older, newer = (run / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
    for choice in ("3", "worst", str(tmp_path / "nowhere")):
        with pytest.raises(UsageError, match=rf" has no checkpoint {choice}: choose best, newest or a step of 1, 2"):
            choose(run, choice)
    with pytest.raises(UsageError, match="step-00000001 is one checkpoint: to choose best, give its run directory"):
        choose(older, "best")
    with pytest.raises(DataError, match="holds no checkpoint"):
        choose(tmp_path / "nowhere", "best")
    with pytest.raises(UsageError, match=r" has no checkpoint 9{5000}: "):
        choose(run, "9" * 5000)
    (older / "manifest.json").unlink()
    for path, choice in ((run, "1"), (older, "newest")):
        with pytest.raises(DataError, match=r"step-00000001 is damaged \(manifest.json is missing\)"):
            choose(path, choice)
    (newer / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="step-00000002 is damaged"):
        choose(run, "best")  # no other one is chosen silently
