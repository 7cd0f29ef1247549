"""Tokenizers that need no training: one id per character or per byte."""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from distgpt.corpus.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens, describe
from distgpt.errors import DataError

FORMAT = "distgpt-tokenizer"
VERSION = 1


class CharTokenizer(Tokenizer):
    """One id per character, in order of code point, like the seed's `sorted(set(text))`."""

    kind = "char"

    def __init__(self, characters: Iterable[str], *, end_of_text: bool) -> None:
        self.characters = "".join(sorted(set(characters)))
        size = len(self.characters)
        table = [character.encode("utf-8", "surrogatepass") for character in self.characters]
        super().__init__([*table, END_OF_TEXT.encode()] if end_of_text else table, size if end_of_text else None)

    def encode(self, text: str) -> Tokens:
        if text.isascii():
            # Characters are sorted, so an ASCII character's id is at most 127 and 255 is free to mean "unknown".
            narrow = text.encode("ascii").translate(self._ascii_ids)
            if b"\xff" in narrow:
                raise self._unknown(text[narrow.index(b"\xff")])
            return np.frombuffer(narrow, dtype=np.uint8).astype(self.dtype)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[codes]
        if ids.min() < 0:
            raise self._unknown(text[int(np.argmax(ids < 0))])
        tokens: Tokens = ids.astype(self.dtype)
        return tokens

    def to_json(self) -> str:
        content = {"kind": self.kind, "characters": self.characters, "end_of_text": self.eot_id is not None}
        return saved_json(content)

    def _with_added_end_of_text(self) -> Self:
        return type(self)(self.characters, end_of_text=True)

    def missing(self, characters: str) -> str:
        """Return those of `characters` that are not in the vocabulary."""
        return "".join(sorted(set(characters) - set(self.characters)))

    @cached_property
    def _ids(self) -> npt.NDArray[np.int32]:
        ids = np.full(0x110000, -1, dtype=np.int32)
        ids[[ord(character) for character in self.characters]] = np.arange(len(self.characters))
        return ids

    @cached_property
    def _ascii_ids(self) -> bytes:
        return self._ids[:256].astype(np.uint8).tobytes()

    @staticmethod
    def _unknown(character: str) -> DataError:
        return DataError(f"the character {describe(character)} is not in the vocabulary")


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8."""

    kind = "bytes"

    def __init__(self, *, end_of_text: bool) -> None:
        table = [bytes([value]) for value in range(256)]
        super().__init__([*table, END_OF_TEXT.encode()] if end_of_text else table, 256 if end_of_text else None)

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.uint16)

    def to_json(self) -> str:
        return saved_json({"kind": self.kind, "end_of_text": self.eot_id is not None})

    def _with_added_end_of_text(self) -> Self:
        return type(self)(end_of_text=True)


def simple_from_json(content: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer whose `to_json` this is. Raises DataError for another version or kind."""
    if content["version"] != VERSION:
        raise DataError(f"tokenizer format version {content['version']}, this distgpt reads {VERSION}")
    end_of_text = bool(content["end_of_text"])
    if content["kind"] == "char":
        return CharTokenizer(content["characters"], end_of_text=end_of_text)
    if content["kind"] == "bytes":
        return ByteTokenizer(end_of_text=end_of_text)
    raise DataError(f"unknown tokenizer kind {content['kind']!r}")


def saved_json(content: Mapping[str, Any]) -> str:
    """Return the content of a tokenizer.json of distgpt's own."""
    return json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1) + "\n"
