"""`python -m distgpt.prepare` in processes of its own: its output, its errors, and the kills that it survives."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import chdir
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from distgpt.corpus.preparing import encode, parts, report, scan, vocabulary
from distgpt.corpus.reading.sources import ReadOptions, Source
from distgpt.corpus.shards import Dataset, open_dataset, verify_dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.corpus.tokenizer.bpe import train_bpe
from distgpt.errors import DataError, StorageError, UsageError
from distgpt.prepare import find_inputs, parse
from tests import jobs

SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture
def prepare(tmp_path: Path) -> Run:
    def run(
        *arguments: object, code: int = 0, small_units: bool = False, **options: object
    ) -> "subprocess.CompletedProcess[bytes]":
        command = [*command_of(tmp_path, small_units), *map(str, arguments)]
        if options:
            done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=120, **options)  # type: ignore[call-overload]
        else:
            with chdir(tmp_path):
                ended = jobs.run(command)
            done = subprocess.CompletedProcess(command, ended.code, ended.stdout.encode(), ended.stderr.encode())
        assert done.returncode == code, done.stderr.decode()
        return done  # type: ignore[no-any-return]

    return run


def command_of(tmp_path: Path, small_units: bool) -> list[str]:
    if not small_units:
        return [sys.executable, "-m", "distgpt.prepare"]
    program = tmp_path / "small_units.py"
    program.write_text(jobs.SMALL_UNITS)
    return [sys.executable, str(program)]


def error_line(done: "subprocess.CompletedProcess[bytes]") -> str:
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("distgpt: error: ")
    return lines[0]


def words(seed: int, count: int) -> str:
    source = random.Random(seed)
    pool = [source.randbytes(source.randrange(1, 5)).hex() for _ in range(400)] + ["naïve", "日本語", "\n", "don't"]
    return " ".join(source.choice(pool) for _ in range(count))


def texts_of(dataset: Dataset) -> tuple[list[str], list[str]]:
    """Return the documents of both splits, decoded."""
    tokenizer = load_tokenizer(dataset.path)
    found: tuple[list[str], list[str]] = ([], [])
    for texts, split in zip(found, (dataset.train, dataset.val), strict=True):
        for tokens, shard in zip(split.shards, dataset.meta["splits"][split.name], strict=True):
            offsets = np.fromfile(dataset.path / shard["index"], dtype=np.uint64).astype(int)
            for start, stop in pairwise(offsets):
                document = tokens[start:stop]
                if dataset.eot_id is not None:
                    assert document[-1] == dataset.eot_id
                    document = document[:-1]
                texts.append(tokenizer.decode(document))
    return found


def all_texts(dataset: Dataset) -> list[str]:
    train, val = texts_of(dataset)
    return train + val


@pytest.mark.parametrize("name", ["my books", "data/books", "book.txt"])
def test_opening_a_text_as_data_suggests_a_prepare_command_that_works(
    name: str, prepare: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(name) if name.endswith(".txt") else Path(name, "a.txt")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a text of some length. " * 100)
    with pytest.raises(DataError) as caught:
        open_dataset(Path(name))
    said = re.search(
        r"has no meta\.json: run python -m distgpt\.prepare (.*), then give (.*) as the data", str(caught.value)
    )
    assert said is not None
    prepare(*shlex.split(said[1]))
    assert open_dataset(Path(*shlex.split(said[2]))).train.tokens > 0
    with pytest.raises(DataError, match=r"data is not a dataset, .*: did you mean data/"):
        open_dataset(Path("data"))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare is not here")
def test_tinyshakespeare_gives_the_token_counts_of_the_seed_project(prepare: Run, tmp_path: Path) -> None:
    done = prepare("--input", SHAKESPEARE, "--output", "data")
    dataset = open_dataset(tmp_path / "data")
    verify_dataset(dataset)
    text = SHAKESPEARE.read_text()
    characters = sorted(set(text))
    ids = [characters.index(character) for character in text[:1000]]
    assert (dataset.vocab_size, dataset.eot_id) == (65, None)
    assert (dataset.train.tokens, dataset.val.tokens) == (1_003_854, 111_540)
    assert dataset.train.shards[0][:1000].tolist() == ids
    assert "".join(all_texts(dataset)) == text
    summary = done.stdout.decode()
    assert max(map(len, summary.splitlines())) <= 80
    assert re.search(
        r"^next .* -m distgpt\.train \w+ --data\.path=data", summary.replace(" \\\n" + " " * 12, " "), re.MULTILINE
    )


def test_without_arguments_it_prepares_the_standard_library_once(prepare: Run, tmp_path: Path) -> None:
    prepare()
    dataset = open_dataset(tmp_path / "data" / "stdlib")
    train, val = texts_of(dataset)
    assert Path(os.__file__).read_text() in train + val
    assert len(train) > len(val) > 0
    assert dataset.vocab_size == len(set("".join(train + val))) + 1
    assert dataset.eot_id == dataset.vocab_size - 1
    before = jobs.contents(tmp_path / "data" / "stdlib")
    done = prepare()
    assert done.stdout.decode().startswith("data/stdlib is already prepared")
    assert len(done.stdout.decode().splitlines()) == 1
    assert done.stderr == b""
    assert {name: jobs.contents(tmp_path / "data" / "stdlib")[name] for name in before} == before


def make_corpus(folder: Path) -> list[str]:
    """Write documents in every format, one far longer than a unit; return their texts in order."""
    folder.mkdir()
    texts = [words(seed, 1 + seed * 7) for seed in range(120)]
    lines = [json.dumps({"text": text, "id": 1}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(lines[:40]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[40:60]).encode()))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[60:80]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[80:100]}), folder / "d.parquet", row_group_size=7)
    for index, text in enumerate(texts[100:]):
        (folder / f"e{index:03d}.txt").write_bytes(text.encode())
    (folder / "f.txt").write_text("")
    long = [words(seed, 35_000) for seed in (1, 2)]
    (folder / "g.txt").write_bytes(long[0].encode())
    (folder / "h.txt.gz").write_bytes(gzip.compress(long[1].encode()))
    return texts + long


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_every_format_is_read_in_full_and_gives_the_same_bytes_for_any_number_of_workers(
    tokenizer: str, prepare: Run, tmp_path: Path
) -> None:
    texts = make_corpus(tmp_path / "in")
    more = ["--vocab-size", 600] if tokenizer == "bpe" else []
    arguments = ["--input", "in", "--tokenizer", tokenizer, *more, "--val-fraction", 0.2, "--shard-tokens", 150_000]
    prepare(*arguments, "--output", "one", "--workers", 1, small_units=True)
    prepare(*arguments, "--output", "three", "--workers", 3, small_units=True)
    assert jobs.contents(tmp_path / "one") == jobs.contents(tmp_path / "three")
    dataset = open_dataset(tmp_path / "one")
    verify_dataset(dataset)
    threshold = int(0.2 * 2**64)
    validates = [
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") < threshold for text in texts
    ]
    assert texts_of(dataset) == (
        [text for text, held in zip(texts, validates, strict=True) if not held],
        [text for text, held in zip(texts, validates, strict=True) if held],
    )
    assert len(dataset.train.shards) > 1
    assert dataset.meta["input"]["documents"] == len(texts)
    size = sum(shard["bytes"] for split in dataset.meta["splits"].values() for shard in split)
    assert size == dataset.meta["input"]["bytes"] == len("".join(texts).encode())


def test_a_single_text_is_split_at_its_end_for_any_size_of_units(prepare: Run, tmp_path: Path) -> None:
    text = words(5, 40_000)
    (tmp_path / "one.txt").write_bytes(text.encode())
    for options in (["char"], ["bpe", "--vocab-size", 500]):
        prepare("--input", "one.txt", "--output", "small", "--tokenizer", *options, small_units=True)
        prepare("--input", "one.txt", "--output", "whole", "--tokenizer", *options)
        small, whole = open_dataset(tmp_path / "small"), open_dataset(tmp_path / "whole")
        assert small.fingerprint == whole.fingerprint
        total = whole.train.tokens + whole.val.tokens
        assert (whole.train.tokens, whole.eot_id) == (int(0.9 * total), None)
        assert [len(texts) for texts in texts_of(whole)] == [1, 1]
        tokenizer = load_tokenizer(tmp_path / "whole")
        assert np.array_equal(np.concatenate([*whole.train.shards, *whole.val.shards]), tokenizer.encode(text))
        for name in ("small", "whole"):
            for path in (tmp_path / name).iterdir():
                path.unlink()
            (tmp_path / name).rmdir()


def test_the_suggested_command_fits_the_longest_shard(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": words(i, 10)[:40]}) + "\n" for i in range(100)))
    done = prepare("--input", "in.jsonl", "--output", "out", "--tokenizer", "bytes", "--shard-tokens", 40)
    assert "--model.block_size=32" in done.stdout.decode()


def test_few_documents_validate_near_the_fraction_or_a_warning_is_printed(prepare: Run, tmp_path: Path) -> None:
    for seed in (1, 3):  # the hash of the training text comes first, and last
        (tmp_path / f"in{seed}").mkdir()
        (tmp_path / f"in{seed}" / "train.txt").write_bytes(words(seed, 30_000).encode())
        (tmp_path / f"in{seed}" / "valid.txt").write_bytes(words(seed + 100, 700).encode())
        arguments = ["--input", f"in{seed}", "--tokenizer", "bytes", "--workers", seed, "--output"]
        done = prepare(*arguments, f"out{seed}", small_units=True)
        assert texts_of(open_dataset(tmp_path / f"out{seed}"))[1] == [words(seed + 100, 700)]
        assert "distgpt: warning: 2.3% of the tokens are for validation, not 10.0%" in done.stderr.decode()
    prepare(*arguments, "again", "--workers", 1, small_units=True)
    assert jobs.contents(tmp_path / "again") == jobs.contents(tmp_path / "out3")


def test_named_validation_text_is_the_validation_split(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    texts = {name: words(seed, 8_000) for seed, name in enumerate(("a", "b", "c", "valid"))}
    for name, text in texts.items():
        (tmp_path / "in" / f"{name}.txt").write_bytes(text.encode())
    arguments = ["--input", "in", "--val-input", "in/valid.txt", "--tokenizer", "bytes", "--output", "out"]
    for workers in (1, 2):
        prepare(*arguments[:-1], f"out{workers}", "--workers", workers, small_units=True)
    assert jobs.contents(tmp_path / "out1") == jobs.contents(tmp_path / "out2")
    for task in (0, 1):
        prepare(*arguments, "--task", f"{task}/2", small_units=True)
    assert jobs.contents(tmp_path / "out") == jobs.contents(tmp_path / "out1")
    dataset = open_dataset(tmp_path / "out")
    verify_dataset(dataset)
    assert texts_of(dataset) == ([texts["a"], texts["b"], texts["c"]], [texts["valid"]])
    assert "already prepared" in prepare(*arguments, small_units=True).stdout.decode()
    swapped = ["--input", "in/valid.txt", "--val-input", "in", "--tokenizer", "bytes", "--output", "out1"]
    assert "nothing is left to train on" in error_line(prepare(*swapped, code=2))
    other = ["--input", "in", "--val-input", "in/a.txt", "--tokenizer", "bytes", "--output", "out1"]
    assert "another input" in error_line(prepare(*other, code=73, small_units=True))


def test_impossible_validation_text_is_an_error_of_one_line(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("some text")
    (tmp_path / "empty.txt").touch()
    arguments = ["--input", "in.txt", "--output", "out", "--val-input"]
    assert "--val-input names no text" in error_line(prepare(*arguments, "empty.txt", code=65))
    swapped = ["--input", "empty.txt", "--output", "out", "--val-input", "in.txt"]
    assert "--input names no text" in error_line(prepare(*swapped, code=65))
    assert "no such input: nowhere" in error_line(prepare(*arguments, "nowhere", code=65))
    for values, said in (
        ([*arguments, "-"], "--val-input needs --input as well"),
        (["--on-bad-document", "skip"], "--on-bad-document has no effect without --input"),
        (["--val-input", "in.txt"], "--val-input needs --input"),
        ([*arguments, "in.txt", "--val-fraction", "0.2"], "--val-fraction: not allowed with argument --val-input"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(values)


def test_standard_input_is_prepared_with_a_saved_tokenizer(prepare: Run, tmp_path: Path) -> None:
    text = "to be or not to be"
    prepare("--input", "-", "--output", "one", input=text.encode())
    dataset = open_dataset(tmp_path / "one")
    assert "".join(all_texts(dataset)) == text
    lines = b'{"body": "be"}\n{"body": ""}\n{"body": "or not"}\n'
    arguments = ["--input", "-", "--text-key", "body", "--tokenizer", "one/tokenizer.json", "--output", "two"]
    prepare(*arguments, input=lines)
    dataset = open_dataset(tmp_path / "two")
    assert sorted(all_texts(dataset)) == ["be", "or not"]
    assert dataset.eot_id == len(set(text))
    assert min(dataset.train.tokens, dataset.val.tokens) > 0
    assert "already prepared" in prepare(*arguments, input=lines).stdout.decode()
    array = b'[{"body": "be"},\n {"body": "or not"}]'
    prepare(*arguments[:-1], "array", input=array)
    assert sorted(all_texts(open_dataset(tmp_path / "array"))) == ["be", "or not"]
    prepare("--input", "-", "--output", "lines", input=b'{"text": "be"}\n{"text": "or not"}\n')
    assert sorted(all_texts(open_dataset(tmp_path / "lines"))) == ["be", "or not"]
    done = prepare(*arguments[:-1], "three", input=b'{"body": "or"}\n{"body": "nut"}\n', code=65)
    assert "standard input holds the character 'u' (U+0075)" in error_line(done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["array", "lines", "one", "two"]


def test_an_end_of_text_token_in_a_text_is_ordinary_text(prepare: Run, tmp_path: Path) -> None:
    text = "a<|endoftext|>b"
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text + str(index)}) for index in range(5)))
    prepare("--input", "in.jsonl", "--output", "out", "--tokenizer", "bpe", "--vocab-size", 257)
    dataset = open_dataset(tmp_path / "out")
    assert sum((tokens == dataset.eot_id).sum() for tokens in (*dataset.train.shards, *dataset.val.shards)) == 5
    assert sorted(all_texts(dataset)) == [text + str(index) for index in range(5)]


def test_bad_documents_stop_the_command_and_up_to_ten_are_listed(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n' + '{"text": null}\n' * 12)
    done = prepare("--input", "in.jsonl", "--output", "out", code=65)
    first, *places = done.stderr.decode().splitlines()
    assert re.search(r"12 (or more )?documents are bad \(--on-bad-document=skip leaves such documents out\):$", first)
    assert places == [f"  in.jsonl, line {line}: 'text' is not a string but NoneType" for line in range(2, 12)]


def test_bad_documents_are_left_out_and_counted_the_same_for_any_number_of_workers(
    prepare: Run, tmp_path: Path
) -> None:
    texts = [words(seed, 2_000) for seed in range(40)]
    lines = [json.dumps({"text": None if index % 4 == 3 else text}) for index, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(words(1, 60_000).encode() + b" caf\xe9")  # bad in the last of its pieces
    arguments = ["--input", "a.jsonl", "b.txt", "--tokenizer", "bytes"]
    skipping = [*arguments, "--on-bad-document", "skip"]
    done = prepare(*skipping, "--output", "one", "--workers", 1, small_units=True)
    prepare(*skipping, "--output", "three", "--workers", 3, small_units=True)
    assert jobs.contents(tmp_path / "one") == jobs.contents(tmp_path / "three")
    dataset = open_dataset(tmp_path / "one")
    assert sorted(all_texts(dataset)) == sorted(text for index, text in enumerate(texts) if index % 4 != 3)
    bad = dataset.meta["input"]["bad_documents"]
    assert (bad["skipped"], bad["replaced"], len(bad["places"])) == (11, 0, 10)
    assert bad["places"][9] == "a.jsonl, line 40: 'text' is not a string but NoneType"
    assert "bad         11 documents left out, 0 with U+FFFD; the first:" in done.stdout.decode()
    prepare(*arguments, "--on-bad-document", "replace", "--output", "replaced", small_units=True)
    dataset = open_dataset(tmp_path / "replaced")
    assert any(text.endswith(" caf\ufffd") for text in all_texts(dataset))
    assert dataset.meta["input"]["bad_documents"]["replaced"] == 1
    line = error_line(prepare(*arguments, "--output", "one", code=73, small_units=True))
    assert "other options" in line


def test_separator_lines_are_reported_and_the_option_splits_at_them(prepare: Run, tmp_path: Path) -> None:
    stories = [f"Once upon a time, story {index}. The end." for index in range(200)]
    (tmp_path / "in.txt").write_text("\n<|endoftext|>\n".join(stories))
    done = prepare("--input", "in.txt", "--output", "one", "--tokenizer", "bytes")
    assert "199 lines of the text look like separators of documents" in done.stderr.decode()
    assert open_dataset(tmp_path / "one").meta["input"]["documents"] == 1
    separated = ["--input", "in.txt", "--tokenizer", "bytes", "--document-separator"]
    assert prepare(*separated, "<|endoftext|>", "--output", "many").stderr == b""
    assert sorted(all_texts(open_dataset(tmp_path / "many"))) == sorted(stories)
    assert "does not occur in the input" in error_line(prepare(*separated, "<|eot|>", "--output", "none", code=65))
    line = error_line(prepare(*separated, r"\n\n", "--output", "none", code=65))
    assert line.endswith(r"does not occur in the input: a shell writes a line end as $'\n'")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--input", "in.txt", "--text-key", "body"], "--text-key"),
        (["--text-key", "body"], "--text-key"),
        (["--input", "in.jsonl", "--document-separator", "x"], "--document-separator"),
        (["--input", "-", "--text-key", "body", "--document-separator", "x"], "--document-separator"),
        (["--encoding", "cp1252"], "--encoding"),
    ],
)
def test_an_option_without_effect_on_any_input_is_an_error(
    options: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("in.txt", "in.jsonl"):
        (tmp_path / file).write_text('{"text": "a"}')
    with pytest.raises(UsageError, match=f"{name} has no effect"):
        find_inputs(parse([*options, "--output", "out"]), tmp_path / "out")


@pytest.mark.parametrize("name", ["latin-9x", "base64", "idna", "punycode", "\0"])
def test_an_encoding_that_is_not_for_text_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no such text encoding"):
        parse(["--input", "in.txt", "--output", "out", "--encoding", name])


def test_the_summary_counts_files_that_are_not_text() -> None:
    assert report.left_out_lines(Counter({".epub": 3, "": 1_000}), scan.BadDocuments(0, 0, [])) == [
        "left out    1,003 files of folders: 1,000 without suffix, 3 .epub"
    ]


def test_an_ignored_file_is_counted_once_and_a_named_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "in/val").mkdir(parents=True)
    for name in ("a.txt", "val/b.txt", "val/book.epub", "README", "LICENSE"):
        (tmp_path / "in" / name).write_text("x")
    inputs = ["--input", f"{tmp_path}/in", f"{tmp_path}/in/README", "--val-input", f"{tmp_path}/in/val"]
    options = parse([*inputs, "--output", "out"])
    found, ignored, _ = find_inputs(options, tmp_path / "out")
    assert len(found) == 3
    assert ignored == {".epub": 1, "": 1}


def test_learning_a_vocabulary_reports_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def slow(texts: Iterable[str], size: int, pattern: str) -> SimpleNamespace:
        may_end.wait()
        return SimpleNamespace(to_json=lambda: "learned")

    monkeypatch.setattr(vocabulary, "PROGRESS_SECONDS", 0.001)
    monkeypatch.setattr(vocabulary, "train_bpe", slow)
    steps = vocabulary.learn_task(([], 300, "gpt2", Path()))
    assert [next(steps), next(steps)] == [0, 0]
    may_end.set()
    assert list(steps)[-1] == "learned"


def test_exact_copies_are_left_out_the_same_for_any_workers_and_after_a_kill(prepare: Run, tmp_path: Path) -> None:
    stories = [words(seed, 60) for seed in range(900)]
    lines = [json.dumps({"text": text}) + "\n" for text in stories]
    (tmp_path / "a.jsonl").write_text("".join(lines[:600] + lines[3:5]))
    (tmp_path / "b.jsonl").write_text("".join(lines[590:] + lines[:10] + ['{"text": ""}\n']))
    long = words(1000, 30_000)  # several parts each
    (tmp_path / "c.txt").write_text(long)
    (tmp_path / "d.txt").write_text(long)
    names = ["a.jsonl", "b.jsonl", "c.txt", "d.txt"]
    arguments = ["--input", *names, "--tokenizer", "bytes", "--dedup", "--output"]
    kill_with_two_parts(tmp_path, *arguments, "out")
    done = prepare(*arguments, "out", small_units=True)
    assert "going on" in done.stderr.decode()
    prepare(*arguments, "alone", "--workers", "1", small_units=True)
    assert jobs.contents(tmp_path / "out") == jobs.contents(tmp_path / "alone")

    dataset = open_dataset(tmp_path / "out")
    assert Counter(all_texts(dataset)) == Counter([*stories, long])
    train, _ = texts_of(dataset)
    assert train == [text for text in [*stories, long] if text in set(train)]  # the first of each was kept
    assert dataset.meta["input"]["documents"] == 924
    assert dataset.meta["input"]["duplicates"] == 23
    summary = done.stdout.decode().splitlines()
    assert "copies      23 left out, 2.49% of the documents" in summary
    assert (
        f"lengths     {sum(map(len, map(str.encode, all_texts(dataset)))) / 901 + 1:,.0f} tokens a document, "
        in "".join(summary)
    )
    assert max(map(len, summary)) <= 80


def test_validation_text_keeps_the_documents_that_training_text_has_too(prepare: Run, tmp_path: Path) -> None:
    for name, text in {"a.txt": "same", "b.txt": "own", "c.txt": "same"}.items():
        (tmp_path / name).write_text(text)
    arguments = ["--tokenizer", "bytes", "--dedup", "--val-input", "c.txt", "--output", "out", "--input"]
    prepare(*arguments, "a.txt", "b.txt")
    assert texts_of(open_dataset(tmp_path / "out")) == (["own"], ["same"])
    done = prepare(*arguments, "a.txt", "--overwrite", code=65)
    assert "is one of --val-input as well: nothing is left to train on" in error_line(done)


def test_urls_give_the_same_bytes_as_files_and_are_downloaded_once(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "ab":
        text = "".join(json.dumps({"text": words(seed, 30)}) + "\n" for seed in range(ord(name), ord(name) + 20))
        (tmp_path / "in" / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "in" / "c.txt").write_text("validation " * 20)
    url = f"file://{tmp_path}/in"
    files = ["--input", "in", "--val-input", "in/c.txt", "--output", "files"]
    urls = ["--input", f"{url}/*.gz", f"{url}/c.txt", "--val-input", f"{url}/c.txt", "--output", "urls"]
    prepare(*files)
    prepare(*urls)
    one, two = (jobs.contents(tmp_path / name) for name in ("files", "urls"))
    assert one == two | {"meta.json": one["meta.json"]}
    assert not (tmp_path / "urls.partial").exists()

    assert "already prepared from this input" in prepare(*urls).stdout.decode()
    (tmp_path / "in" / "c.txt").write_text("other " * 20)
    assert "was prepared from another input" in error_line(prepare(*urls, code=73))

    (tmp_path / "in" / "c.txt").write_bytes(b"caf\xe9")
    assert f"{url}/c.txt is not UTF-8" in error_line(prepare(*urls, "--overwrite", code=65))
    kept = sorted(path.name.partition("-")[2] for path in (tmp_path / "urls.partial" / "remote").iterdir())
    assert kept == ["a.json.gz", "b.json.gz", "c.txt"]
    prepare(*urls, "--overwrite", "--encoding", "latin-1")
    assert not (tmp_path / "urls.partial").exists()
    missing = prepare("--input", f"{url}/nothing.txt", "--output", "other", code=65)
    assert error_line(missing) == f"distgpt: error: no such input: {url}/nothing.txt"


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def part_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out.partial" / "parts").glob("*.part"))


def kill_with_two_parts(tmp_path: Path, *arguments: object) -> None:
    """Start the command, and kill it when two or more parts are done."""
    command = [*command_of(tmp_path, True), *map(str, arguments)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: len(part_files(tmp_path)) >= 2, process)
        process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_a_stopped_command_goes_on_and_writes_the_same_bytes(
    number: signal.Signals, code: int, prepare: Run, tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_bytes(words(9, 400_000).encode())
    arguments = ["--input", "in.txt", "--tokenizer", "char", "--output"]
    command = [*command_of(tmp_path, True), *arguments, "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True) as process:
        wait_for(lambda: len(part_files(tmp_path)) >= 3, process)
        # As a terminal or a batch system does it: to every process. A kill only hits the one.
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert not (tmp_path / "out").exists()
    if code == 75:
        [line] = stderr.decode().splitlines()
        assert line == f"distgpt: error: stopped by {number.name}: run the same command again to go on"
    done = prepare(*arguments, "out", small_units=True)
    assert "going on: " in done.stderr.decode()
    assert not (tmp_path / "out.partial").exists()
    prepare(*arguments, "whole", small_units=True)
    assert jobs.contents(tmp_path / "out") == jobs.contents(tmp_path / "whole")


def test_parts_of_another_input_are_not_used(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(words(9, 400_000).encode())
    kill_with_two_parts(tmp_path, "--input", "in.txt", "--output", "out")
    (tmp_path / "in.txt").write_bytes(words(10, 400_000).encode())
    done = prepare("--input", "in.txt", "--output", "out", small_units=True)
    assert "going on" not in done.stderr.decode()
    assert "".join(all_texts(open_dataset(tmp_path / "out"))) == words(10, 400_000)


def test_after_a_kill_other_options_start_over(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(words(9, 400_000).encode())
    kill_with_two_parts(tmp_path, "--input", "in.txt", "--output", "out")
    arguments = ["--input", "in.txt", "--tokenizer", "bytes", "--output"]
    done = prepare(*arguments, "out", small_units=True)
    assert "going on" not in done.stderr.decode()
    prepare(*arguments, "whole", small_units=True)
    assert jobs.contents(tmp_path / "out") == jobs.contents(tmp_path / "whole")


@pytest.mark.parametrize("position", [0, 20, -1000, -10])  # the count of rows, a row, a token, the hash
def test_a_part_that_was_damaged_after_a_kill_is_made_again(position: int, prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(words(9, 400_000).encode())
    kill_with_two_parts(tmp_path, "--input", "in.txt", "--output", "out")
    raw = bytearray(part_files(tmp_path)[1].read_bytes())
    raw[position] ^= 1
    part_files(tmp_path)[1].write_bytes(raw)
    done = prepare("--input", "in.txt", "--output", "out", small_units=True)
    assert "going on: " in done.stderr.decode()
    assert "".join(all_texts(open_dataset(tmp_path / "out"))) == words(9, 400_000)


def test_a_damaged_part_is_an_error(tmp_path: Path) -> None:
    parts.write_part(tmp_path, 0, [((3, True, 7), np.array([1, 2, 3], dtype=np.uint16))])
    assert parts.read_part(tmp_path, 0)[1].tolist() == [1, 2, 3]
    whole = (tmp_path / "000000.part").read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole[:-3] + b"abc", b"x" + whole[1:]):
        (tmp_path / "000000.part").write_bytes(damaged)
        with pytest.raises(StorageError, match=r"000000\.part is damaged: run the same command again"):
            parts.read_part(tmp_path, 0)


@pytest.mark.parametrize("texts", [["some text"], ["", "some", "text"]])
def test_no_part_is_written_with_ids_that_differ_from_hugging_face(
    texts: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = train_bpe(["some text"], 260)
    wrong.__dict__["ids_of_ranks"] = wrong.ids_of_ranks[::-1]
    monkeypatch.setattr(encode, "load_once", lambda *_: wrong)
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = Source(str(path), "in.jsonl", "jsonl", "", ReadOptions())
    pieces = [scanned for scanned, _ in scan.scan_task((source, False))]
    options = encode.EncodeOptions(tokenizer=tmp_path, eot_id=None, hashes={})
    with pytest.raises(DataError, match=r"^the tokenizer is wrong for in\.jsonl: after '' its ids are"):
        list(encode.encode_units(([encode.Unit(0, pieces)], tmp_path, options)))
    assert list(tmp_path.iterdir()) == [path]


def test_a_vocabulary_damaged_after_a_kill_is_learned_again(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(words(9, 400_000).encode())
    arguments = ["--input", "in.txt", "--tokenizer", "bpe", "--vocab-size", 300, "--output"]
    kill_with_two_parts(tmp_path, *arguments, "out")
    saved = tmp_path / "out.partial" / "tokenizer.json"
    damaged = json.loads(saved.read_text())
    damaged["model"]["merges"][5], damaged["model"]["merges"][6] = damaged["model"]["merges"][6:4:-1]
    saved.write_text(json.dumps(damaged))
    prepare(*arguments, "out", small_units=True)
    prepare(*arguments, "whole", small_units=True)
    assert jobs.contents(tmp_path / "out") == jobs.contents(tmp_path / "whole")


def test_an_existing_output_is_kept_unless_it_is_the_same_or_overwritten(prepare: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"text {name} " * 50)
    prepare("--input", "one.txt", "--output", "out")
    before = jobs.contents(tmp_path / "out")
    assert "already prepared" in prepare("--input", "one.txt", "--output", "out").stdout.decode()
    assert "another input" in error_line(prepare("--input", "two.txt", "--output", "out", code=73))
    done = prepare("--input", "one.txt", "--output", "out", "--val-fraction", 0.3, code=73)
    assert "other options: use another --output, or --overwrite" in error_line(done)
    assert {name: jobs.contents(tmp_path / "out")[name] for name in before} == before
    (tmp_path / "out" / "meta.json").unlink()
    assert "not a whole dataset" in error_line(prepare("--input", "one.txt", "--output", "out", code=73))
    prepare("--input", "two.txt", "--output", "out", "--overwrite")
    assert "".join(all_texts(open_dataset(tmp_path / "out"))) == "text two " * 50
    (tmp_path / "out" / "thesis.tex").touch()
    done = prepare("--input", "two.txt", "--output", "out", "--overwrite", code=73)
    assert "holds files that are not a dataset's" in error_line(done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.txt", "out", "two.txt"]


def test_an_output_that_another_process_has_just_made_is_not_replaced(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("words " * 100)
    arguments = ["--input", "in.txt", "--output"]
    for name, flags in (("mine", []), ("other", ["--val-fraction", 0.3])):
        prepare(*arguments, f"{name}-ready", *flags)
        # The other process commits between the first look at the output and the lock.
        program = (
            "import os; from distgpt.corpus.preparing import staging; from distgpt.cli import main_guard\n"
            "from distgpt.prepare import main\n"
            "exclusive = staging.exclusive\n"
            f"staging.exclusive = lambda output: (os.rename('{name}-ready', output), exclusive(output))[1]\n"
            "main_guard(main)"
        )
        command = [sys.executable, "-c", program, *arguments, name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        if name == "mine":
            assert (done.returncode, b"already prepared" in done.stdout) == (0, True), done
        else:
            assert (done.returncode, "other options" in error_line(done)) == (73, True)
        assert not (tmp_path / f"{name}.partial").exists()


def test_an_output_that_cannot_be_read_is_not_overwritten(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("words " * 100)
    arguments = ["--input", "in.txt", "--output", "out"]
    prepare(*arguments)
    meta = tmp_path / "out" / "meta.json"
    meta.write_text(meta.read_text().replace('"version": 1', '"version": 9'))
    line = error_line(prepare(*arguments, code=65))
    assert line.endswith("out has dataset format version 9, this distgpt reads 1")
    meta.unlink()
    meta.mkdir()  # permissions do not stop root
    line = error_line(prepare(*arguments, code=65))
    assert line.endswith("meta.json: Is a directory")


def test_the_output_may_be_in_a_folder_of_the_input(prepare: Run, tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    prepare("--input", "one.txt", "two.txt", "--output", "out")
    (tmp_path / "out.partial" / "parts").mkdir(parents=True)
    for values in (["one.txt", "two.txt", "out", "out.partial"], ["*"], ["."]):
        assert "already prepared" in prepare("--input", *values, "--output", "out").stdout.decode()


def test_a_byte_order_mark_is_neither_a_document_nor_counted(prepare: Run, tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    for name, text in (("a.txt", b""), ("b.txt", b"some text")):
        (tmp_path / name).write_bytes(mark + text)
    prepare("--input", "a.txt", "b.txt", "--output", "out")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.meta["input"]["documents"] == 1
    assert dataset.meta["input"]["bytes"] == len("some text")
    assert "".join(all_texts(dataset)) == "some text"
    assert "no text: a.txt is empty" in error_line(prepare("--input", "a.txt", "--output", "none", code=65))


def test_a_full_standard_output_is_an_error_that_keeps_the_dataset(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("words " * 100)
    command = [*command_of(tmp_path, False), "--input", "in.txt", "--output", "out"]
    for _ in range(2):  # when it is prepared, and when it is found prepared
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 74
        assert done.stderr.decode() == "distgpt: error: cannot write: No space left on device\n"
        assert open_dataset(tmp_path / "out").train.tokens == 540


def test_characters_of_several_bytes_have_the_ids_of_the_seed_project(prepare: Run, tmp_path: Path) -> None:
    text = words(4, 40_000) + "日本語 naïve 🙂"
    (tmp_path / "in.txt").write_bytes(text.encode())
    prepare("--input", "in.txt", "--output", "out", small_units=True)
    dataset = open_dataset(tmp_path / "out")
    characters = sorted(set(text))
    ids = [characters.index(character) for character in text]
    cut = int(0.9 * len(text))
    assert (dataset.vocab_size, dataset.eot_id) == (len(characters), None)
    assert np.concatenate(dataset.train.shards).tolist() == ids[:cut]
    assert np.concatenate(dataset.val.shards).tolist() == ids[cut:]


def test_merges_that_tiktoken_cannot_do_have_the_ids_of_hugging_face(prepare: Run, tmp_path: Path) -> None:
    # "abc" has a merge of its own, but "bc" comes first and leaves nothing to merge "ab" with.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id_ for id_, token in enumerate([*alphabet, "bc", "ab", "abc"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["b", "c"], ["a", "b"], ["ab", "c"]]}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    content = {"version": "1.0", "truncation": cut, "pre_tokenizer": pre, "model": model}
    (tmp_path / "own.json").write_text(json.dumps(content))
    for index, text in enumerate(("x", "abc")):  # the first piece does not show it
        (tmp_path / f"{index}.txt").write_text(text)
    done = prepare("--input", "0.txt", "1.txt", "--tokenizer", "own.json", "--output", "out")
    assert "distgpt: own.json: its truncation will not be applied" in done.stderr.decode()
    assert "using the slow one" in done.stderr.decode()
    dataset = open_dataset(tmp_path / "out")
    owner = tokenizers.Tokenizer.from_file(str(tmp_path / "own.json"))
    owner.no_truncation()
    expected = owner.encode("abc").ids
    assert expected == [vocab["a"], vocab["bc"]]
    assert load_tokenizer(tmp_path / "out").encode("abc").tolist() == expected
    tokens = np.concatenate([*dataset.train.shards, *dataset.val.shards]).tolist()
    assert dataset.eot_id is not None
    assert sorted(tokens) == sorted([vocab["x"], dataset.eot_id, *expected, dataset.eot_id])


@pytest.mark.parametrize("name", ["in.txt.zst", "in.parquet"])
def test_memory_is_bounded_for_highly_compressed_input(name: str, tmp_path: Path) -> None:
    text = "a b " * 50_000
    if name == "in.parquet":
        rows = pyarrow.array([text, text.upper()] * 600).dictionary_encode()
        pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(zstandard.compress(text.encode() * 1_200))
    assert (tmp_path / name).stat().st_size < 2**17
    (tmp_path / "program.py").write_text(jobs.SMALL_UNITS.replace("2**16", "2**20"))
    done = subprocess.run(
        [sys.executable, "program.py", "--input", name, "--output", "out", "--tokenizer", "bytes", "--workers", "1"],
        cwd=tmp_path,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (160 * 2**20, 160 * 2**20)),
        check=False,
    )
    assert done.returncode == 0
    dataset = open_dataset(tmp_path / "out")
    assert dataset.train.tokens + dataset.val.tokens >= 240_000_000


def test_a_long_phase_prints_its_speed_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with report.progress("encoding", 200_000_000) as known, report.progress("keeping standard input", None) as unknown:
        known(10_000_000)
        assert capsys.readouterr().err == ""
        now += 20
        known(40_000_000)
        unknown(40_000_000)
        known(1)  # too soon for another line
        now += 20
        known(150_000_001)
    assert capsys.readouterr().err.splitlines() == [
        "distgpt: encoding: 25% of 200 MB, 2.5 MB/s, 1m00s left",
        "distgpt: keeping standard input: 40 MB, 2.0 MB/s",
        "distgpt: encoding: 40s so far, all 200 MB done",
    ]


def test_a_bar_shows_the_time_left_and_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with report.progress("learning a vocabulary of 1,048,576", 123_456_789_000) as advance:
        advance(0)
        advance(123_456_789_000)
        advance(0)
    first, *_, shown = [line.rstrip() for line in terminal.getvalue().split("\r") if line.strip()]
    assert re.fullmatch(r"learning a vocabulary of 1,048,576   0% \|.*\| 0\.00/123GB, .*/s, \S+ left", first)
    assert re.fullmatch(r"learning a vocabulary of 1,048,576 123GB, 00:0\d so far", shown)
    assert max(map(len, (first, shown))) < 80


def test_a_damaged_dataset_is_an_error_for_prepare_and_verify(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("words " * 100)
    prepare("--input", "in.txt", "--output", "out")
    assert "OK" in prepare("--verify", "out").stdout.decode()
    raw = bytearray((tmp_path / "out" / "train-00000.bin").read_bytes())
    raw[100] ^= 1
    (tmp_path / "out" / "train-00000.bin").write_bytes(raw)
    for arguments in (["--verify", "out"], ["--input", "in.txt", "--output", "out"]):
        assert "train-00000.bin is damaged" in error_line(prepare(*arguments, code=65))
    prepare("--input", "in.txt", "--output", "out", "--overwrite")
    prepare("--verify", "out")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--input", "good.txt"], 2, "--input needs --output"),
        (["--inptu", "good.txt"], 2, "--inptu"),
        (["--input", "good.txt", "--output", "out", "--val-fraction", "1"], 2, "--val-fraction is 1.0"),
        (["--input", "good.txt", "--output", "out", "--workers", "0"], 2, "--workers is 0"),
        (["--input", "good.txt", "--output", "out", "--vocab-size", "500"], 2, "belongs to --tokenizer bpe"),
        (
            ["--input", "good.txt", "--output", "out", "--tokenizer", "bpe", "--vocab-size", "1048577"],
            2,
            "at most 1048576",
        ),
        (["--input", "good.txt", "--output", "out", "--tokenizer", "bpe", "--vocab-size", "0"], 2, "at least 257"),
        (["--input", "", "--output", "out"], 2, "an --input is empty"),
        (["--input", "pipes", "--output", "out"], 2, "pipes/one.txt is neither a file nor a folder"),
        (["--input", "good.txt", "--output", "out", "--tokenizer", "bqe"], 2, "bqe is neither char, bytes, bpe"),
        (["--input", "good.txt", "--output", "out", "--tokenizer", "good.txt"], 65, "good.txt is not a tokenizer"),
        (["--input", "nowhere.txt", "--output", "out"], 65, "no such input: nowhere.txt"),
        (["--input", "no*.txt", "--output", "out"], 65, "no such input: no*.txt"),
        (["--input", "empty.txt", "--output", "out"], 65, "no text: empty.txt is empty"),
        (["--input", "folder", "--output", "out"], 65, "folder holds no text"),
        (["--input", "latin.txt", "--output", "out"], 65, "latin.txt is not UTF-8: byte 3"),
        (["--input", "latin.txt.gz", "--output", "out"], 65, "latin.txt.gz is not UTF-8: byte 3"),
        (["--input", "bad.jsonl", "--output", "out"], 65, "bad.jsonl, line 2: not JSON"),
        (["--input", "key.jsonl", "--output", "out"], 65, "key.jsonl, line 1: no key 'text'"),
        (["--input", "letter.txt", "--output", "out"], 65, "single token"),
        (["--input", "same.jsonl", "--output", "out"], 65, "the same text"),
        (["--input", "good.txt", "--output", "good.txt"], 65, "names no file but the output: good.txt"),
        (["--input", "letter.txt", "--output", "good.txt"], 73, "good.txt exists and is not a whole dataset"),
        (["--input", "good.txt", "--output", "good.txt/out"], 73, "cannot write"),
        (["--input", "good.txt", "--output", "/proc/out"], 73, "cannot write"),
        (["--verify", "folder"], 65, "not a dataset, it has no meta.json"),
    ],
)
def test_bad_input_is_an_error_of_one_line_and_leaves_nothing(
    arguments: list[str], code: int, reason: str, prepare: Run, tmp_path: Path
) -> None:
    for name in ("folder", "pipes"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipes" / "one.txt")
    for name, content in {
        "good.txt": b"good text",
        "empty.txt": b"",
        "latin.txt": b"caf\xe9",
        "latin.txt.gz": gzip.compress(b"caf\xe9"),
        "bad.jsonl": b'{"text": "a"}\n{"text": \n',
        "key.jsonl": b'{"body": "a"}\n',
        "letter.txt": b"a",
        "same.jsonl": b'{"text": "a"}\n' * 3,
    }.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    done = prepare(*arguments, code=code)
    assert reason in error_line(done)
    assert done.stdout == b""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_limit_on_file_sizes_keeps_the_finished_parts(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(words(3, 60_000).encode())

    def small_files() -> None:
        # Parts of 64 KiB of text fit, the whole does not. Python ignores SIGXFSZ, so writing fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    arguments = ["--input", "in.txt", "--output", "out", "--tokenizer", "bytes"]
    done = prepare(*arguments, small_units=True, preexec_fn=small_files, code=74)
    assert "no space left for" in error_line(done)
    assert "out.partial" in error_line(done)
    assert not (tmp_path / "out").exists()
    assert "going on: " in prepare(*arguments, small_units=True).stderr.decode()
    verify_dataset(open_dataset(tmp_path / "out"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_keeps_the_finished_parts(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(words(3, 200_000).encode())
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path / "disk"], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        arguments = ["--input", "in.txt", "--output", "disk/out", "--tokenizer", "bytes"]
        done = prepare(*arguments, small_units=True, code=74)
        assert "No space left on device" in error_line(done)
        assert list((tmp_path / "disk" / "out.partial" / "parts").glob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path / "disk"], check=True)
        assert "going on: " in prepare(*arguments, small_units=True).stderr.decode()
        verify_dataset(open_dataset(tmp_path / "disk" / "out"))
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def test_gpt2_without_a_network_names_the_file_and_the_variable(prepare: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("words " * 10)
    proxies = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    environment = {**os.environ, **proxies, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    done = prepare("--input", "in.txt", "--output", "out", "--tokenizer", "gpt2", code=74, env=environment)
    line = error_line(done)
    for part in ("r50k_base.tiktoken", "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4", "TIKTOKEN_CACHE_DIR", "cache"):
        assert part in line


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "t.parquet"), ("zstandard", "t.txt.zst"), ("zstandard", ".")])
def test_a_missing_optional_package_is_an_error_of_one_line(module: str, name: str, tmp_path: Path) -> None:
    (tmp_path / ("t.json.zst" if name == "." else name)).touch()
    program = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = ['--input', {name!r}, '--output', 'out'];"
        "from distgpt.cli import main_guard; from distgpt.prepare import main; main_guard(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert f"needs the package {module}: pip install {module}" in error_line(done)


def test_help_answers_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from distgpt.prepare import main; sys.argv[1:] = ['--help']\n"
        "try: main()\n"
        "finally: assert not {'torch', 'tokenizers', 'tiktoken', 'pyarrow'} & set(sys.modules), 'too much imported'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ".jsonl" in done.stdout
