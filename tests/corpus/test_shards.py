"""The prepared directory: readable by anyone, refused when damaged, verified once."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from distgpt.corpus.shard_writer import Documents, write_dataset
from distgpt.corpus.shards import Dataset, is_dataset_file, open_dataset, verify_dataset
from distgpt.corpus.tokenizer.simple import ByteTokenizer
from distgpt.errors import DataError

DOCUMENTS = [f"document {index}, {'long ' * (index % 7)}" for index in range(40)]


def write(path: Path, *, shard_tokens: int | None = None) -> Dataset:
    tokenizer = ByteTokenizer(end_of_text=True)

    def documents() -> list[Documents]:
        batches = []
        for index, text in enumerate(DOCUMENTS):
            tokens = np.append(tokenizer.encode(text), np.uint16(256))
            split: Literal["train", "val"] = "val" if index % 5 == 0 else "train"
            # Every third document comes in two batches.
            cut = 4 if index % 3 == 0 else 0
            batches.append(Documents(split, tokens[:cut], np.array([], dtype=np.int64)))
            batches.append(Documents(split, tokens[cut:], np.array([tokens.size - cut], dtype=np.int64)))
        return batches

    path.mkdir()
    write_dataset(
        path,
        documents(),
        tokenizer=tokenizer,
        eot_id=256,
        shard_tokens=shard_tokens,
        about={"options": {}, "input": {}},
        advance=lambda count: None,
    )
    return open_dataset(path)


def train_texts() -> list[str]:
    return [text for index, text in enumerate(DOCUMENTS) if index % 5]


def test_tokens_and_offsets_are_plain_files(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data")
    tokens = np.memmap(tmp_path / "data" / "train-00000.bin", dtype=np.uint16, mode="r")
    offsets = np.fromfile(tmp_path / "data" / "train-00000.idx", dtype=np.uint64)
    texts = train_texts()
    assert offsets.size == len(texts) + 1
    assert offsets[0] == 0
    assert offsets[-1] == tokens.size == dataset.train.tokens
    for text, start, stop in zip(texts, offsets, offsets[1:], strict=False):
        assert bytes(tokens[int(start) : int(stop) - 1].astype(np.uint8)).decode() == text
        assert tokens[int(stop) - 1] == dataset.eot_id == 256
    assert dataset.vocab_size == 257
    assert dataset.train.shards[0].dtype == np.uint16
    [shard] = dataset.meta["splits"]["train"]
    assert shard["bytes"] == sum(map(len, texts))
    assert shard["documents"] == len(texts)


def test_shards_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    whole, cut = write(tmp_path / "whole"), write(tmp_path / "cut", shard_tokens=100)
    assert len(cut.train.shards) > 3
    assert np.array_equal(np.concatenate(cut.train.shards), whole.train.shards[0])
    assert np.array_equal(np.concatenate(cut.val.shards), whole.val.shards[0])
    for tokens, shard in zip(cut.train.shards, cut.meta["splits"]["train"], strict=True):
        offsets = np.fromfile(cut.path / shard["index"], dtype=np.uint64)
        assert offsets[0] == 0
        assert offsets[-1] == tokens.size
        assert np.array_equal(np.flatnonzero(tokens == 256) + 1, offsets[1:])
        assert offsets[-2] < 100
    assert all(tokens.size >= 100 for tokens in cut.train.shards[:-1])
    assert whole.fingerprint != cut.fingerprint


def test_nanogpt_finds_its_names_beside_a_split_of_one_shard(tmp_path: Path) -> None:
    whole, cut = write(tmp_path / "whole"), write(tmp_path / "cut", shard_tokens=100)
    for split in (whole.train, whole.val):
        # As its train.py and sample.py read them.
        tokens = np.memmap(whole.path / f"{split.name}.bin", dtype=np.uint16, mode="r")
        assert np.array_equal(tokens, split.shards[0])
        assert (whole.path / f"{split.name}.bin").samefile(whole.path / f"{split.name}-00000.bin")
    meta = pickle.loads((whole.path / "meta.pkl").read_bytes())
    assert meta["vocab_size"] == 257
    text = DOCUMENTS[1]
    assert [meta["stoi"][character] for character in text] == ByteTokenizer(end_of_text=True).encode(text).tolist()
    assert "".join(meta["itos"][id_] for id_ in whole.train.shards[0][: len(text) + 1]) == text + "<|endoftext|>"
    assert not [path for path in cut.path.iterdir() if path.name in ("train.bin", "val.bin", "meta.pkl")]
    assert all(is_dataset_file(path.name) for path in whole.path.iterdir())


def test_files_written_for_nanogpt_are_never_read(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data")
    (tmp_path / "data" / "meta.pkl").write_bytes(f"cos\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode())
    (tmp_path / "data" / "train.bin").unlink()
    verify_dataset(open_dataset(dataset.path), always=True)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "data" / "meta.pkl").read_bytes())
    assert (tmp_path / "ran").exists(), "it is one that would have run"


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    dataset = write(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert open_dataset(tmp_path / "there").fingerprint == dataset.fingerprint


def cut_short(path: Path) -> None:
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size - 2)


def edit_meta(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    meta = json.loads((path / "meta.json").read_text())
    change(meta)
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: shutil.rmtree(path), r"no prepared data in .*: run python -m distgpt\.prepare"),
        (lambda path: (path / "meta.json").unlink(), r"not a dataset, it has no meta\.json: run python -m"),
        (lambda path: (path / "meta.json").write_text("{"), r"meta\.json is damaged"),
        (lambda path: (path / "meta.json").write_text("{}"), r"not written by distgpt\.prepare"),
        (lambda path: edit_meta(path, lambda meta: meta.update(version=9)), r"version 9, this distgpt reads 1"),
        (lambda path: edit_meta(path, lambda meta: meta.pop("splits")), r"meta\.json is damaged .*'splits'"),
        (lambda path: edit_meta(path, lambda meta: meta.update(vocab_size="x")), r"meta\.json is damaged"),
        (
            lambda path: cut_short(path / "train-00000.bin"),
            r"train-00000\.bin is cut short: 1,818 bytes instead of 1,820",
        ),
        (lambda path: cut_short(path / "val-00000.idx"), r"val-00000\.idx is cut short: 70 bytes instead of 72"),
        (
            lambda path: (path / "val-00000.bin").unlink(),
            r"val-00000\.bin is missing: prepare it again",
        ),
        (lambda path: (path / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    ],
)
def test_an_incomplete_dataset_is_not_opened(damage: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    write(tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises(DataError, match=reason):
        open_dataset(tmp_path / "data")


def test_a_path_that_cannot_be_read_is_an_error_of_one_line() -> None:
    with pytest.raises(DataError, match=r"cannot read \S+: File name too long"):
        open_dataset(Path("x" * 300))


@pytest.mark.parametrize(("soft", "hard", "opens"), [(60, 4096, True), (60, 60, False)])
def test_more_shards_than_open_files_are_allowed(soft: int, hard: int, opens: bool, tmp_path: Path) -> None:
    write(tmp_path / "data", shard_tokens=1)  # 40 of them
    for _ in range(3):
        edit_meta(tmp_path / "data", lambda meta: meta["splits"]["train"].extend(meta["splits"]["train"]))
    program = (
        "import resource, sys; from pathlib import Path; from distgpt.cli import main_guard;"
        "from distgpt.corpus.shards import open_dataset;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}));"
        "main_guard(lambda: open_dataset(Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "data"], capture_output=True, text=True)
    if opens:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        [line] = done.stderr.splitlines()
        assert done.returncode == 65
        assert line.endswith(
            "Too many open files; raise ulimit -n, or prepare it again in fewer shards, with a larger --shard-tokens"
        )


def flip(path: Path, position: int, mask: int = 1) -> None:
    with open(path, "rb+") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "val-00000.bin", "train-00000.idx", "val-00000.idx", "tokenizer.json"]
)
def test_one_flipped_bit_is_found_in_every_file(name: str, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data")
    verify_dataset(dataset)
    flip(tmp_path / "data" / name, 40)
    with pytest.raises(DataError, match=rf"{name} is damaged: its SHA-256"):
        verify_dataset(open_dataset(tmp_path / "data"))


def test_a_token_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    write(tmp_path / "data")
    flip(tmp_path / "data" / "train-00000.bin", 2 * 321 + 1, mask=0x80)
    with pytest.raises(
        DataError, match=r"train-00000\.bin is damaged: token 321 is \d+, outside the vocabulary of 257"
    ):
        verify_dataset(open_dataset(tmp_path / "data"))


def test_only_the_first_use_and_changed_files_are_verified(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data")
    path = tmp_path / "data" / "train-00000.bin"
    before = path.stat()
    verify_dataset(dataset)
    flip(path, 40)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    verify_dataset(dataset)
    with pytest.raises(DataError, match="SHA-256"):
        verify_dataset(dataset, always=True)
    os.utime(path)
    with pytest.raises(DataError, match="SHA-256"):
        verify_dataset(dataset)


def test_a_directory_that_cannot_be_written_is_verified_every_time(tmp_path: Path) -> None:
    dataset = write(tmp_path / "data")
    (tmp_path / "data" / ".verified.json").mkdir()
    verify_dataset(dataset)
    flip(tmp_path / "data" / "train-00000.bin", 40)
    with pytest.raises(DataError, match="SHA-256"):
        verify_dataset(dataset)
