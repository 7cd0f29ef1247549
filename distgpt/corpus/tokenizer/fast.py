"""Byte-level BPE by gigatoken: many times faster than tiktoken and Hugging Face tokenizers, with the same result.

gigatoken is young and optional, so it is used with care: only in the version that was compared with the other two, and
only for vocabularies and characters on which all three agree by construction. Each run compares the first ids of every
part of its text again.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from distgpt.corpus.tokenizer.base import Tokens
from distgpt.corpus.tokenizer.bpe import LONGEST_WORD, BpeTokenizer, from_merges, train_bpe
from distgpt.errors import DistgptError, Interrupted

VERSION = "0.10.0"
# The letters and numbers of Unicode 15 to 17, mostly of rare scripts: gigatoken has the tables of Unicode 17, tiktoken
# and Hugging Face tokenizers have older ones.
_NEWER = """
088f 0c5c 0cdc 1c89-1c8a a7cb-a7cf a7d2 a7d4 a7da-a7dc a7f1 105c0-105f3 10940-10959 10d40-10d65 10d6f-10d85 10ec2-10ec7
1123f-11240 11380-11389 1138b 1138e 11390-113b5 113b7 113d1 113d3 116d0-116e3 11bc0-11be0 11bf0-11bf9 11db0-11ddb
11de0-11de9 11f02 11f04-11f10 11f12-11f33 11f50-11f59 1342f 13441-13446 13460-143fa 16100-1611d 16130-16139 16d40-16d6c
16d70-16d79 16ea0-16eb8 16ebb-16ed3 16ff2-16ff6 187f8-187ff 18cff 18d09-18d1e 18d80-18df2 1b132 1b155 1ccf0-1ccf9
1d2c0-1d2d3 1df25-1df2a 1e030-1e06d 1e4d0-1e4eb 1e4f0-1e4f9 1e5d0-1e5ed 1e5f0-1e5fa 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5
1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b739-2b73f 2cea2-2cead 2ebf0-2ee5d 31350-33479
"""
SEPARATOR = b"\xff"  # never occurs in UTF-8
# gigatoken remembers every word; loading it anew forgets them.
BYTES_BEFORE_RELOAD = 2**27
_SAMPLE_FILE_BYTES = 8 * 2**20
_COMPARED_BYTES = 2**18
_COMPARED_VOCABULARY = 1_024


class MismatchError(DistgptError):
    """gigatoken gives, or might give, another result than tiktoken and Hugging Face tokenizers."""


@cache
def why_unavailable() -> str:
    """Return why gigatoken cannot be used here; "" if it can."""
    try:
        found = version("gigatoken")
    except PackageNotFoundError:
        return f"gigatoken {VERSION} is not installed"
    return "" if found == VERSION else f"gigatoken {found} is installed, and only {VERSION} was compared"


def has_newer_characters(text: str) -> bool:
    """Return True if the libraries may cut this text into different words."""
    if text.isascii():
        return False
    return bool(newer_characters()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")].any())


class FastEncoder:
    """Encodes as `tokenizer` does. Its `is_slow` must be False, and its pattern GPT-2's."""

    needs_whole_text = False

    def __init__(self, tokenizer: BpeTokenizer) -> None:
        self._tokenizer, self.dtype = tokenizer, tokenizer.dtype
        tokenizer.is_slow = False  # the caller knows it; computing it takes long
        self._json = tokenizer.json_of_ranks()
        self._ids = tokenizer.ids_of_ranks
        self._remembered = 0
        self._gigatoken = load(self._json)

    def encode(self, text: str) -> Tokens:
        """Return what `tokenizer.encode` does. Raises the same, and MismatchError if gigatoken fails."""
        if has_newer_characters(text):
            return self._tokenizer.encode(text)
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            return self._tokenizer.encode(text)  # which raises the error
        self._remembered += len(raw)
        if self._remembered > BYTES_BEFORE_RELOAD:
            self._remembered, self._gigatoken = len(raw), load(self._json)
        with _panics_as_errors():
            ids: Tokens = self._ids.take(self._gigatoken.encode(raw))
        return ids

    def check(self, text: str) -> None:
        """Raise MismatchError if the ids of `text` are not those of tiktoken; check these as `tokenizer.check` does."""
        if not np.array_equal(self.encode(text), self._tokenizer.encode(text)):
            raise MismatchError("gigatoken gives other ids than tiktoken")
        self._tokenizer.check(text[: len(text) // 8])  # Hugging Face tokenizers takes longer


def train(texts: Callable[[], Iterable[str]], vocab_size: int, directory: Path) -> BpeTokenizer:
    """Return what `train_bpe(texts(), vocab_size)` does; the texts go through files in `directory`.

    Raises MismatchError if gigatoken would learn something else or that cannot be excluded, OSError.
    """
    with TemporaryDirectory(dir=directory) as folder:
        sample = list(_write_sample(texts(), Path(folder)))
        with TemporaryDirectory(dir=folder) as compared:
            first = sample[0].read_bytes()[:_COMPARED_BYTES]
            _compare(first, min(vocab_size, _COMPARED_VOCABULARY), Path(compared))
        merges = _merges(sample, vocab_size)
        tokenizer = from_merges(merges)
        # Hugging Face gives one id to two merges with one result, and does not merge a pair that occurs only once.
        if len({left + right for left, right in merges}) < vocab_size - 256:
            raise MismatchError("two merges have one result, or the text is short for so many tokens")
        if not _occurs_twice(vocab_size - 1, tokenizer, sample):
            raise MismatchError("the text is short for so many tokens")
        return tokenizer


def _compare(raw: bytes, vocab_size: int, folder: Path) -> None:
    """Raise MismatchError if gigatoken learns another vocabulary from this text than Hugging Face tokenizers."""
    texts = [piece.decode(errors="ignore") for piece in raw.split(SEPARATOR)]  # the last one may be cut
    sample = list(_write_sample(texts, folder))
    if from_merges(_merges(sample, vocab_size)).to_json() != train_bpe(texts, vocab_size).to_json():
        raise MismatchError("it learns other tokens, or the text is short for so many tokens")


def _merges(sample: Sequence[Path], vocab_size: int) -> list[tuple[bytes, bytes]]:
    """Return the merges that gigatoken learns."""
    import gigatoken

    source = gigatoken.TextFileSource(list(sample), separator=SEPARATOR)
    with _silence(), _panics_as_errors():
        _, merges = gigatoken.train_bpe(source, vocab_size, [])
    return merges


def _occurs_twice(id_: int, tokenizer: BpeTokenizer, sample: Sequence[Path]) -> bool:
    """Return True if the token that was merged last is found twice: then every earlier one was as frequent."""
    encoder = FastEncoder(tokenizer)
    found = 0
    for path in sample:
        for raw in path.read_bytes().split(SEPARATOR):
            found += int(np.count_nonzero(encoder.encode(raw.decode()) == id_))
            if found > 1:
                return True
    return False


def _write_sample(texts: Iterable[str], folder: Path) -> Iterator[Path]:
    """Write the texts to files, separated, with long words cut. Yield the paths. Raises MismatchError, OSError."""
    batch = bytearray()
    for number, text in enumerate(texts):
        if has_newer_characters(text):
            raise MismatchError("the text has characters that some library does not know yet")
        raw = text.encode()
        batch += SEPARATOR.join([*_pieces(raw), b""]) if _may_hold_long_word(raw) else raw + SEPARATOR
        if len(batch) >= _SAMPLE_FILE_BYTES:
            yield _write(folder / f"{number}.txt", batch)
            batch.clear()
    yield _write(folder / "last.txt", batch)


def _write(path: Path, content: bytearray) -> Path:
    path.write_bytes(content)
    return path


def _may_hold_long_word(raw: bytes) -> bool:
    """Return False if all words are short enough: a long one is all spaces or has at most one, before it."""
    values = np.frombuffer(raw, dtype=np.uint8)
    is_space = (values == 0x20) | ((values >= 0x09) & (values <= 0x0D))
    may_be_space = is_space | (values >= 0x80)
    return any(_longest_run(mask) >= LONGEST_WORD for mask in (~is_space, may_be_space))


def _longest_run(mask: npt.NDArray[np.bool_]) -> int:
    """Return the length of the longest run of True."""
    others = np.flatnonzero(~mask)
    return int(np.diff(others, prepend=-1, append=mask.size).max()) - 1


def _pieces(raw: bytes) -> Iterator[bytes]:
    """Yield the words of a text, long ones in pieces as `train_bpe` cuts them. Raises MismatchError."""
    import gigatoken

    for word in gigatoken.pretokenizer(raw):
        if len(word) > LONGEST_WORD and not word.isascii():
            raise MismatchError(f"the text has a word of {len(word):,} bytes")
        for start in range(0, len(word), LONGEST_WORD):
            yield word[start : start + LONGEST_WORD]


def load(content: str) -> Any:
    """Return gigatoken's tokenizer of a tokenizer.json. Raises MismatchError."""
    import gigatoken

    with _panics_as_errors():
        return gigatoken.Tokenizer.from_json(content)


@cache
def newer_characters() -> npt.NDArray[np.bool_]:
    """Return a table by code point: True for the characters in _NEWER, about which the libraries may differ."""
    table = np.zeros(0x110000, dtype=np.bool_)
    for characters in _NEWER.split():
        first, _, last = characters.partition("-")
        table[int(first, 16) : int(last or first, 16) + 1] = True
    return table


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Raise MismatchError for an exception of gigatoken. A panic in Rust raises one that is no Exception."""
    try:
        yield
    except Interrupted:  # raised by a signal
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise MismatchError(f"gigatoken failed: {error}") from None
        raise


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what gigatoken prints about its training, without Python's print()."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(null, descriptor)
        yield
    finally:
        for descriptor, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, descriptor)
        for descriptor in (null, *kept):
            os.close(descriptor)
