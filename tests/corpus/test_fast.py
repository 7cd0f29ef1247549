"""gigatoken: the same ids as tiktoken, the same vocabulary as Hugging Face, and a fallback that says so."""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers

from distgpt.corpus.preparing import build, encode
from distgpt.corpus.preparing.workers import Workers
from distgpt.corpus.tokenizer import fast, huggingface
from distgpt.corpus.tokenizer.bpe import BpeTokenizer, from_merges, train_bpe
from distgpt.errors import DataError, Interrupted
from distgpt.prepare import job_of, parse

ALPHABET = [
    *"aaetos   \n\n\t'-.,!1290",
    "'s",
    "'ll",
    " the",
    "\r\n",
    "\x00",
    "\x85",
    "\u3000",
    "é",
    "日本",
    "🙂",
    "\u0301",
]
CODES = [*range(0x80, 0xD800), *range(0xE000, 0x35000)]
LITERAL = "before<|endoftext|>after"


def nonsense(seed: int, length: int) -> str:
    """Return characters of many kinds: common ones, and any of Unicode."""
    source = random.Random(seed)
    return "".join(source.choices([*ALPHABET * 10, *map(chr, source.choices(CODES, k=50))], k=length))


def older(text: str) -> str:
    """Leave out the characters about which libraries may differ."""
    return "".join(character for character in text if not fast.has_newer_characters(character))


@pytest.fixture(scope="module")
def trained() -> BpeTokenizer:
    return train_bpe([nonsense(seed, 2_000) for seed in range(40)], 1_500)


def test_fuzz_gives_the_ids_of_tiktoken(trained: BpeTokenizer) -> None:
    encoder = fast.FastEncoder(trained)
    unlike = 0
    for seed in range(1_500):
        text = nonsense(seed, seed % 300) + LITERAL
        unlike += fast.has_newer_characters(text)
        assert np.array_equal(encoder.encode(text), trained.encode(text)), seed
        assert encoder.encode(text).dtype == np.uint16
    assert 100 < unlike < 1_400


@pytest.mark.parametrize("text", ["", "a" * 50_000, "\n" * 9_999, "ACGT" * 5_000, "日本語" * 5_000, "\0" * 5_000])
def test_odd_texts_give_the_ids_of_tiktoken(text: str, trained: BpeTokenizer) -> None:
    assert np.array_equal(fast.FastEncoder(trained).encode(text), trained.encode(text))


def test_a_text_that_is_not_utf8_is_the_same_error(trained: BpeTokenizer) -> None:
    with pytest.raises(DataError, match="must be UTF-8"):
        fast.FastEncoder(trained).encode("caf\udce9")


def test_characters_that_libraries_see_differently_are_left_to_tiktoken() -> None:
    # A probe and the first byte of a character are one token if both are in one word.
    probes = (b"a", b"1", b"!", b"\n")
    tokenizer = from_merges([(probe, bytes([value])) for probe in probes for value in range(0x80, 0x100)])
    encoder = fast.FastEncoder(tokenizer)
    characters = [chr(code) for code in CODES if not fast.newer_characters()[code]]
    assert len(CODES) - len(characters) == 14_049
    for probe in probes:
        text = "".join(f"{probe.decode()}{character} " for character in characters)
        ids = encoder.encode(text)
        assert np.array_equal(ids, tokenizer.encode(text))
        assert 0 < np.count_nonzero(ids >= 256) < len(characters)


def test_ids_that_are_not_ranks_are_kept(trained: BpeTokenizer) -> None:
    content = json.loads(trained.to_json())
    content["model"]["vocab"] = {token: 1_600 - id_ for token, id_ in content["model"]["vocab"].items()}
    content["added_tokens"] = [{"id": 7, "content": "<|endoftext|>", "special": True}]
    other = BpeTokenizer(json.dumps(content))
    text = nonsense(1, 500) + LITERAL
    ids = fast.FastEncoder(other).encode(text)
    assert np.array_equal(ids, other.encode(text))
    assert np.array_equal(ids, 1_600 - trained.encode(text))


def test_memory_is_bounded_by_reloading_gigatoken(trained: BpeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = list[str]()
    load = fast.load

    def counted(content: str) -> Any:
        loads.append(content)
        return load(content)

    monkeypatch.setattr(fast, "load", counted)
    monkeypatch.setattr(fast, "BYTES_BEFORE_RELOAD", 1_000)
    encoder = fast.FastEncoder(trained)
    for _ in range(9):
        encoder.encode("x" * 250)
    assert len(loads) == 3


def test_training_gives_the_vocabulary_of_hugging_face(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = [older(nonsense(seed, 3_000)) for seed in range(30)]
    long_words = ["ACGT" * 2_000 + " and x='" + "!" * 5_000 + "'s", "\n" * 4_100 + "a" + " \n" * 2_500, "x" * 2_048]
    texts = [*texts, LITERAL, "", *long_words, *texts]
    assert fast.train(lambda: iter(texts), 700, tmp_path).to_json() == train_bpe(texts, 700).to_json()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", ""), "what gigatoken prints is dropped"


@pytest.mark.parametrize(
    ("text", "vocab_size", "reason"),
    [
        ("\U000323b0 is a letter since Unicode 17", 300, "some library does not know"),
        ("語" * 1_000, 300, "a word of 3,000 bytes"),
        ("a few words", 400, "short for so many tokens"),
        (older(nonsense(0, 20_000)), 5_000, "short for so many tokens"),
        ("abcdefgh ijkl", 261, "short for so many tokens"),
    ],
)
def test_a_text_that_gigatoken_may_learn_otherwise_is_left_to_hugging_face(
    text: str, vocab_size: int, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(fast.MismatchError, match=reason):
        fast.train(lambda: iter([text]), vocab_size, tmp_path)


class NoWorkers(Workers):
    """For a text so small that it is prepared in this process."""

    def __init__(self) -> None:
        super().__init__(2)

    def run(
        self, function: Callable[[Any], Iterator[Any]], tasks: Sequence[Any], *, here: bool = False
    ) -> Iterator[tuple[int, Any]]:
        assert here or not tasks
        return super().run(function, tasks, here=True)


def prepared(output: Path, *arguments: object) -> dict[str, bytes]:
    """Prepare a dataset of a small text in this process; return its files."""
    options = parse([*map(str, arguments), "--output", str(output)])
    build.prepare(job_of(options, output), NoWorkers())
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.fixture
def inputs(trained: BpeTokenizer, tmp_path: Path) -> list[object]:
    (tmp_path / "tokenizer.json").write_text(trained.to_json())
    lines = [json.dumps({"text": "some words " * 20 + str(number)}) for number in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, json.dumps({"text": "é, the last"})]))
    return ["--input", tmp_path / "in.jsonl", "--tokenizer", tmp_path / "tokenizer.json"]


def test_a_second_text_in_one_process_is_encoded_with_its_own_tokenizer(inputs: list[object], tmp_path: Path) -> None:
    first = prepared(tmp_path / "out", *inputs)
    Path(str(inputs[-1])).write_text(train_bpe(["another text " * 9], 260).to_json())
    second = prepared(tmp_path / "out", *inputs, "--overwrite")
    assert second["train-00000.bin"] != first["train-00000.bin"]
    assert second == prepared(tmp_path / "other", *inputs)


def test_a_signal_while_a_library_encodes_is_no_error_of_the_library(
    inputs: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise Interrupted("stopped by SIGTERM")

    monkeypatch.setattr(fast, "load", lambda _: SimpleNamespace(encode=stop))
    with pytest.raises(Interrupted):
        prepared(tmp_path / "out", *inputs)
    monkeypatch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_str=stop))
    with pytest.raises(Interrupted):
        huggingface.load_encoder("{}")


@pytest.mark.parametrize("failure", ["other ids", "panic"])
def test_a_gigatoken_that_is_wrong_is_found_said_and_not_used(
    failure: str,
    inputs: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = prepared(tmp_path / "right", *inputs)
    assert "gigatoken" not in capsys.readouterr().err
    monkeypatch.setattr(encode, "CHECKED_CHARACTERS", 10**6)
    with monkeypatch.context() as changed:
        if failure == "panic":
            wrong = SimpleNamespace(encode=lambda _: (_ for _ in ()).throw(PanicException("a panic")))
            changed.setattr(fast, "load", lambda _: wrong)
        else:
            kept = fast.load
            changed.setattr(fast, "load", lambda content: SimpleNamespace(encode=wrong_encode(kept(content))))
        found = prepared(tmp_path / "found", *inputs)
    assert "gigatoken gives other ids than tiktoken for this text: encoding all of it again" in capsys.readouterr().err
    assert found.keys() == right.keys()
    assert all(found[name] == right[name] for name in found if name.endswith((".bin", ".idx")))


class PanicException(BaseException):
    """What a panic in Rust raises has this name and is no Exception."""


def wrong_encode(right: Any) -> Callable[[bytes], Any]:
    return lambda raw: right.encode(raw.replace("é".encode(), b"e"))


@pytest.mark.parametrize(("found", "said"), [("9.9.9", "gigatoken 9.9.9 is installed, and only"), (None, "gigatoken")])
def test_the_output_is_the_same_without_the_version_that_was_compared(
    found: str | None,
    said: str,
    inputs: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = prepared(tmp_path / "right", *inputs)
    monkeypatch.setattr(fast, "why_unavailable", fast.why_unavailable.__wrapped__)
    monkeypatch.setattr(fast, "version", version_of(found))
    monkeypatch.setattr(fast, "load", None)
    monkeypatch.setattr(build, "LARGE_BYTES", 1_000)
    assert prepared(tmp_path / "found", *inputs) == right
    assert said in capsys.readouterr().err


def version_of(found: str | None) -> Callable[[str], str]:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    return version
