"""Checkpoints that an attacker crafted, with valid hashes: nothing in them runs, hangs or fills memory."""

import io
import json
import os
import pickle
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

from distgpt.checkpoint.compatibility import require_same_run
from distgpt.checkpoint.index import read_index
from distgpt.checkpoint.manifest import MANIFEST, checkpoint_path, committed, find_damage, manifest_bytes, read_state
from distgpt.checkpoint.reader import load_for_inference
from distgpt.checkpoint.store import Store
from distgpt.config import resolve
from distgpt.corpus.shards import Dataset
from distgpt.errors import DataError, StorageError
from distgpt.run.lock import Owner
from tests import jobs
from tests.checkpoint.checkpoints import CPU, ORIGIN, SMALL, newest, sign_again, trainee
from tests.strangers import Payload

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WEIGHT = "model.token_embedding.weight"
SECONDS = 60.0  # far more than any of these takes


def index_of(checkpoint: Path) -> Metadata:
    found = pickle.loads((checkpoint / ".metadata").read_bytes())
    assert isinstance(found, Metadata)
    return found


def with_index(change: Callable[[Metadata, Payload], Any]) -> Callable[[Path, Payload], None]:
    """An attack that changes the index."""

    def attack(checkpoint: Path, payload: Payload) -> None:
        index = index_of(checkpoint)
        changed = change(index, payload)
        content = changed if isinstance(changed, bytes) else pickle.dumps(index, protocol=4)
        (checkpoint / ".metadata").write_bytes(content)

    return attack


def place_of(index: Metadata, name: str = WEIGHT) -> tuple[MetadataIndex, _StorageInfo]:
    return next((key, place) for key, place in index.storage_data.items() if key.fqn == name)


def moved(**fields: Any) -> Callable[[Path, Payload], None]:
    """An attack that changes the place of a tensor in the index."""
    return with_index(lambda index, _: vars(place_of(index)[1]).update(fields))


def with_payload(content: Callable[[bytes, Payload], bytes], *, as_bytes: bool = False) -> Callable[..., None]:
    """An attack that replaces a stored tensor, with an index that agrees."""

    def attack(checkpoint: Path, payload: Payload) -> None:
        index = index_of(checkpoint)
        key, place = place_of(index)
        shard = checkpoint / place.relative_path
        stored = shard.read_bytes()
        new = content(stored[place.offset : place.offset + place.length], payload)
        place.offset, place.length = len(stored), len(new)
        shard.write_bytes(stored + new)
        if as_bytes:
            index.state_dict_metadata[key.fqn] = BytesStorageMetadata()
            index.storage_data = {k: v for k, v in index.storage_data.items() if k.fqn != key.fqn}
            index.storage_data[MetadataIndex(key.fqn)] = place
        (checkpoint / ".metadata").write_bytes(pickle.dumps(index, protocol=4))

    return attack


def packed(stored: bytes, kind: int, member: str = "", content: bytes = b"") -> bytes:
    """Return a stored tensor as another zip file, with other content for names that end in `member`."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stored)) as old, zipfile.ZipFile(out, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, content if member and name.endswith(member) else old.read(name))
    return out.getvalue()


def saved_with(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def resized(index: Metadata, *size: int) -> None:
    tensor: Any = index.state_dict_metadata[WEIGHT]
    tensor.size = tensor.chunks[0].sizes = torch.Size(size)


def in_planner_data(index: Metadata, payload: Payload) -> None:
    index.planner_data = {"model": payload}


def in_a_size(index: Metadata, payload: Payload) -> None:
    tensor: Any = index.state_dict_metadata[WEIGHT]
    tensor.size = payload


def in_chunks_that_overlap(index: Metadata, _: Payload) -> None:
    """Chunks with the right number of values in all, but the first row twice and not the last one."""
    key, place = place_of(index)
    tensor: Any = index.state_dict_metadata[WEIGHT]
    rows, columns = tensor.size
    half = place.length // 2
    spans = [(0, rows - 1, place.offset, half), (rows - 2, 1, place.offset + half, place.length - half)]
    tensor.chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([n, columns])) for at, n, _, _ in spans]
    del index.storage_data[key]
    for at, _, offset, length in spans:
        moved_to = _StorageInfo(place.relative_path, offset, length)
        index.storage_data[MetadataIndex(WEIGHT, torch.Size([at, 0]))] = moved_to


def of_another_dtype(index: Metadata, _: Payload) -> None:
    tensor: Any = index.state_dict_metadata[WEIGHT]
    tensor.properties.dtype = torch.float64


def with_one_more(index: Metadata, _: Payload) -> None:
    key, place = place_of(index)
    index.state_dict_metadata["model.more"] = index.state_dict_metadata[WEIGHT]
    index.storage_data[MetadataIndex("model.more", key.offset)] = _StorageInfo(place.relative_path, place.offset, 0)


def without_one(index: Metadata, _: Payload) -> None:
    key = place_of(index)[0]
    del index.state_dict_metadata[WEIGHT], index.storage_data[key]


def nested(levels: int, tuple_of: bytes = b"\x85") -> bytes:
    """Nested tuples as the key of a dict: their hash would overflow the stack."""
    return b"\x80\x04}(" + b")" + tuple_of * levels + b"Nu."


def doubled(levels: int) -> bytes:
    """Tuples that repeat tuples as the key of a dict: their hash would take 2^levels steps."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * levels + b"Ns."


class Sized:
    """Becomes `size` bytes when torch.load() unpickles it, with functions that torch.load() allows."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return bytearray, (self.size,)


def in_place_of(name: str, make: Callable[[Path], None]) -> Callable[[Path, Payload], None]:
    """An attack that puts something else in the place of a file, and keeps the manifest."""

    def attack(checkpoint: Path, _: Payload) -> None:
        (checkpoint / name).unlink()
        make(checkpoint / name)

    return attack


def zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


def link_out(file: Path) -> None:
    elsewhere = file.parents[3] / "elsewhere"
    elsewhere.write_bytes(b"other")
    file.symlink_to(elsewhere)


def with_state(**fields: Any) -> Callable[[Path, Payload], None]:
    """An attack that changes train.json."""

    def attack(checkpoint: Path, _: Payload) -> None:
        state = json.loads((checkpoint / "train.json").read_text())
        (checkpoint / "train.json").write_text(json.dumps(state | fields))

    return attack


def configured(**fields: Any) -> Callable[[Path, Payload], None]:
    """An attack that changes the model config in train.json."""

    def attack(checkpoint: Path, _: Payload) -> None:
        state = json.loads((checkpoint / "train.json").read_text())
        state["config"]["model"] |= fields
        (checkpoint / "train.json").write_text(json.dumps(state))

    return attack


def state_is(content: str) -> Callable[[Path, Payload], None]:
    def attack(checkpoint: Path, _: Payload) -> None:
        (checkpoint / "train.json").write_text(content)

    return attack


def manifest_names(name: str) -> Callable[[Path, Payload], None]:
    def attack(checkpoint: Path, _: Payload) -> None:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        (checkpoint / MANIFEST).write_bytes(manifest_bytes({**files, name: files["train.json"]}, None))

    return attack


ATTACKS: dict[str, Callable[..., None]] = {
    "the index is a command": with_index(lambda _, payload: pickle.dumps(payload)),
    "a command in the index's plan": with_index(in_planner_data),
    "a command for a size": with_index(in_a_size),
    "a tensor that is called bytes": with_payload(lambda _, payload: saved_pickle(payload), as_bytes=True),
    "a command for a tensor": with_payload(lambda _, payload: saved_pickle(payload)),
    "a command in a tensor's record": with_payload(
        lambda stored, payload: packed(stored, zipfile.ZIP_STORED, "data.pkl", pickle.dumps(payload))
    ),
    "a dict for a tensor": with_payload(lambda *_: saved_with({"a": torch.ones(2)})),
    "a tensor of another shape": with_payload(lambda *_: saved_with(torch.ones(3))),
    "a tensor that is packed": with_payload(lambda stored, _: packed(stored, zipfile.ZIP_DEFLATED)),
    "a record that names a tuple again and again": with_payload(
        lambda stored, _: packed(stored, zipfile.ZIP_STORED, "data.pkl", doubled(60))
    ),
    "a record that asks for 200 GB": with_payload(
        lambda stored, _: packed(stored, zipfile.ZIP_STORED, "data.pkl", pickle.dumps(Sized(2 * 10**11), protocol=2))
    ),
    "no zip file at all": with_payload(lambda *_: b"junk" * 100),
    "a file above": moved(relative_path="../../../elsewhere"),
    "an absolute path": moved(relative_path="/dev/zero"),
    "another file of the checkpoint": moved(relative_path="tokenizer.json"),
    "an offset before the file": moved(offset=-1),
    "an offset behind the file": moved(offset=2**40),
    "a length behind the file": moved(length=2**50),
    "a length of 10^30": moved(length=10**30),
    "transformed tensors": moved(transform_descriptors=["zstd"]),
    "a tensor of 2^60 numbers": with_index(lambda index, _: resized(index, 2**30, 2**30)),
    "a tensor of another size": with_index(lambda index, _: resized(index, 7, 16)),
    "a tensor of another dtype": with_index(of_another_dtype),
    "chunks that overlap": with_index(in_chunks_that_overlap),
    "a tensor too many": with_index(with_one_more),
    "a tensor too few": with_index(without_one),
    "tuples in each other": with_index(lambda *_: nested(1_000_000)),
    "lists in each other": with_index(lambda *_: b"\x80\x04" + b"(]" * 1_000_000 + b"e" * 1_000_000 + b"."),
    "a long index of garbage": with_index(lambda *_: b"\x80\x04" + b"]" * 2**25 + b"."),
    "a memo of a million": with_index(lambda *_: b"\x80\x04]" + b"\x94" * 1_000_000 + b"."),
    "a list of a million dicts": with_index(lambda *_: b"\x80\x04]" + (b"(" + b"}" * 10_000 + b"e") * 100 + b"."),
    "dicts by the million": with_index(lambda *_: b"\x80\x04" + b"}" * 2_000_000 + b"."),
    "a memo of 2^31": with_index(lambda *_: b"\x80\x04Nr\xff\xff\xff\x7f."),
    "a string of 2^62 bytes": with_index(lambda *_: b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a."),
    "an extension code": with_index(lambda *_: b"\x80\x04\x82\x01."),
    "a pipe for the index": in_place_of(".metadata", os.mkfifo),
    "a pipe for the state": in_place_of("train.json", os.mkfifo),
    "a pipe for the tokenizer": in_place_of("tokenizer.json", os.mkfifo),
    "a pipe for the tensors": in_place_of("__0_0.distcp", os.mkfifo),
    "a pipe for the manifest": in_place_of(MANIFEST, os.mkfifo),
    "an endless manifest": in_place_of(MANIFEST, zeros),
    "an endless state": in_place_of("train.json", zeros),
    "a link out": in_place_of("__0_0.distcp", link_out),
    "a manifest with a path": manifest_names("../../../elsewhere"),
    "a step below zero": with_state(step=-5),
    "a step of 10^30": with_state(step=10**30),
    "another step than its name": with_state(step=1000),
    "a step that is a word": with_state(step="2"),
    "a step that is true": with_state(step=True),
    "a config that is none": with_state(config=[1]),
    "a config of garbage": with_state(config={"model": 3}),
    "a vocabulary of 10^12": with_state(vocab_size=10**12),
    "a model of 10^9 layers": configured(n_layer=10**9),
    "a model of 0 heads": configured(n_head=0),
    "a window of 10^30": configured(block_size=10**30),
    "a loss of 10^400": with_state(val_loss=10**400),
    "a guard of garbage": with_state(guard={"losses": "a"}),
    "a guard of 10^400": with_state(guard={"losses": [10**400]}),
    "a guard that skipped NaN": with_state(guard={"skips": float("nan")}),
    "a state of garbage": state_is("garbage"),
    "a state that is a list": state_is("[1, 2]"),
    "a state without end": state_is("[" * 1_000_000),
}


# The tensors are valid, and training with another config does not read the stored one.
OTHER_MODELS: dict[str, Callable[[Path, Payload], None]] = {
    "a model of 10^7 layers": configured(n_layer=10**7),
    "a model that is too wide": configured(n_embd=2**24),
    "a hidden layer of 2^24": configured(mlp_hidden=2**24),
    "a vocabulary of 2^31": with_state(vocab_size=2**31 - 1),
}


def saved_pickle(payload: Payload) -> bytes:
    """Return an object as torch.save() writes it."""
    return saved_with(payload)


@pytest.fixture(autouse=True)
def little_memory() -> Any:
    """Limit each test here to 4 GiB more memory than at its start."""
    if sys.platform != "linux":
        yield
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**32, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_crafted_checkpoint_is_refused_in_one_line(run: Path, dataset: Dataset, tmp_path: Path, name: str) -> None:
    """The functions with which sample, evaluate, train and replay load a checkpoint refuse it."""
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    crafted, marker = newest(run), tmp_path / "ran"
    ATTACKS[name](crafted, Payload(f"touch {marker}"))
    if all((crafted / file).is_file() and not (crafted / file).is_symlink() for file in os.listdir(crafted)):
        sign(crafted)
    began = time.monotonic()
    for load in (lambda: load_for_inference(run, CPU), lambda: trainee(run, dataset).checkpointer.restore()):
        with pytest.raises(DataError) as refused:
            load()
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 1000
    assert time.monotonic() - began < SECONDS
    assert not marker.exists()


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_model_other_than_the_stored_one_is_not_allocated(run: Path, name: str) -> None:
    """sample, evaluate and replay take the config of the checkpoint, and check it first."""
    OTHER_MODELS[name](newest(run), Payload(""))
    sign_again(newest(run))
    began = time.monotonic()
    with pytest.raises(DataError, match=r"has a config of another model|and the model has"):
        load_for_inference(run, CPU)
    assert time.monotonic() - began < SECONDS


def sign(checkpoint: Path) -> None:
    """Make the manifest agree with the files, as sign_again() does, if it lists files of a checkpoint only."""
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    if all("/" not in name for name in files):
        try:
            sign_again(checkpoint)
        except AssertionError:
            assert find_damage(checkpoint) != []  # the content is wrong, but its hashes are right
            assert not any("hash" in problem for problem in find_damage(checkpoint))


def test_a_list_that_is_named_many_times_costs_little(run: Path) -> None:
    """The work does not grow with the square of the size of the index."""
    index = index_of(newest(run))
    tensor: Any = index.state_dict_metadata[WEIGHT]
    tensor.chunks = [tensor.chunks[0]] * 20_000
    index.state_dict_metadata |= {f"model.{number}": tensor for number in range(20_000)}
    (newest(run) / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(DataError, match="do not agree"):
        read_index(newest(run))


@pytest.mark.parametrize("protocol", [4, 5])  # those that Python writes by default
def test_an_index_is_read_as_it_was_written(saved: Path, tmp_path: Path, protocol: int) -> None:
    shutil.copytree(newest(saved), tmp_path / "step-00000002")
    written = index_of(newest(saved))
    (tmp_path / "step-00000002" / ".metadata").write_bytes(pickle.dumps(written, protocol=protocol))
    found = read_index(tmp_path / "step-00000002")
    assert found.state_dict_metadata == written.state_dict_metadata
    assert found.storage_data == written.storage_data


def test_a_copy_under_another_name_is_not_the_newest(run: Path, dataset: Dataset) -> None:
    """It is moved aside, so that it is not in the way of later checkpoints."""
    shutil.copytree(checkpoint_path(run / "checkpoints", 1), run / "checkpoints" / "step-99999999")
    assert "is of step 1" in find_damage(run / "checkpoints" / "step-99999999")[0]
    require_same_run(run / "checkpoints", resolve([*SMALL], {}), dataset, replicas=1)
    assert load_for_inference(run, CPU)[2].step == 2
    subject = trainee(run, dataset)
    assert subject.checkpointer.restore() == 2
    assert subject.messages[0].startswith("going on from step-00000002; skipped step-99999999")
    assert [read_state(checkpoint).step for checkpoint in committed(run / "checkpoints")] == [2, 1]


@pytest.mark.parametrize("name", ["step-000000002", "step-" + "9" * 200])
def test_a_directory_with_an_impossible_step_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert committed(tmp_path) == []


def test_a_directory_in_the_way_of_a_commit_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, Owner(1, "here", "now", 1, "today"))
    store.create_staging(7, 0)
    in_the_way = checkpoint_path(tmp_path, 7)
    in_the_way.mkdir()
    (in_the_way / "file").touch()
    with pytest.raises(StorageError, match=f"^{in_the_way} is in the way"):
        store.commit(7, {}, ORIGIN)


@pytest.mark.parametrize("command", ["sample", "evaluate", "replay"])
def test_each_command_refuses_with_exit_65(run: Path, tmp_path: Path, command: str) -> None:
    for checkpoint in committed(run / "checkpoints"):
        ATTACKS["a tensor that is called bytes"](checkpoint, Payload(f"touch {tmp_path / 'ran'}"))
        sign_again(checkpoint)
    extra = ("--step=3",) if command == "replay" else ()
    ended = jobs.command(command, str(run), *extra)
    assert ended.code == 65, ended
    assert not (tmp_path / "ran").exists()
