"""The interface of all tokenizers.

Every tokenizer is lossless: the UTF-8 bytes of its ids, put together, are the bytes of the text. `encode` never gives
the end-of-text id: a literal "<|endoftext|>" in a text is ordinary text.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from distgpt.errors import DataError

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 2**20

Tokens = npt.NDArray[np.unsignedinteger[Any]]


class Tokenizer(ABC):
    """Encodes text as ids below `vocab_size`. `table` holds the bytes of each id, end-of-text included.

    `dtype` is that of ids: uint16, or uint32 for a vocabulary of more than 65,536. `notes` tell the user which settings
    of its file are not applied, or are missing.
    """

    kind: str
    # A text that is encoded in pieces may get other ids, or be cut within a token.
    needs_whole_text = False
    notes: Sequence[str] = ()

    def __init__(self, table: Sequence[bytes], eot_id: int | None) -> None:
        self.vocab_size = len(table)
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.dtype("<u2" if len(table) <= 2**16 else "<u4")
        self.eot_id = eot_id
        self._table = list(table)

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Return the ids of `text`, (n,) of `dtype`. Raises DataError for a character that the vocabulary lacks."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the content of a tokenizer.json that `load_tokenizer` reads."""

    @abstractmethod
    def _with_added_end_of_text(self) -> Self:
        """Return the same tokenizer with an id for end-of-text, usually one more, the last."""

    def with_end_of_text(self) -> Self:
        """Return this tokenizer if it has an end-of-text id; otherwise the same with one more id for it."""
        return self if self.eot_id is not None else self._with_added_end_of_text()

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
        """Return the bytes of these ids: for streaming, as a character may need several tokens. Raises DataError."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            bad = array[(array < 0) | (array >= self.vocab_size)][0]
            raise DataError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        return b"".join(map(self._table.__getitem__, array.tolist()))

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """Return the text of these ids; bytes that are not UTF-8 become U+FFFD. Raises DataError."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_texts(self) -> list[str]:
        """Return the text of each token; bytes that are not UTF-8 become U+FFFD."""
        return [token.decode("utf-8", errors="replace") for token in self._table]

    def check(self, text: str) -> None:
        """Raise DataError if the ids of `text` do not decode to it, or the library of the format gives other ids."""
        if self.decode_bytes(self.encode(text)) != text.encode():
            raise DataError("decoding its ids does not give the text back: distgpt cannot use this tokenizer")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Return the number of UTF-8 bytes of text of each token, int64 (vocab_size,); 0 for end-of-text."""
        sizes = np.array([len(token) for token in self._table], dtype=np.int64)
        if self.eot_id is not None:
            sizes[self.eot_id] = 0
        return sizes


def differences(theirs: Tokenizer, ours: Tokenizer, path: Path) -> Iterator[str]:
    """Yield how `ours`, which is in `path`, differs from another one: in size, end-of-text, the first token."""
    if theirs.vocab_size != ours.vocab_size:
        yield f"the tokenizer has {theirs.vocab_size:,} ids there and {ours.vocab_size:,} in {path}"
    if theirs.eot_id != ours.eot_id:
        yield f"the end-of-text id is {theirs.eot_id} there and {ours.eot_id} in {path}"
    for id_ in range(min(theirs.vocab_size, ours.vocab_size)):
        then, now = theirs.decode_bytes([id_]), ours.decode_bytes([id_])
        if then != now:
            yield f"token {id_} is {then!r} there and {now!r} in {path}"
            return


def describe(character: str) -> str:
    """Return the repr and code point of a character, so that a person can find it."""
    return f"{character!r} (U+{ord(character):04X})"
