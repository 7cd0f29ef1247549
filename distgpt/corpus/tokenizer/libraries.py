"""Tokenizers that encode with the library of their format: any other tokenizer.json, and the models of SentencePiece.

Their ids are those of the library by construction. The bytes of a token follow from the kind of its vocabulary: bytes
written as characters, "▁" for a space, or "##" for no space.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from distgpt.corpus.tokenizer import huggingface
from distgpt.corpus.tokenizer.base import END_OF_TEXT, Tokenizer, Tokens
from distgpt.corpus.tokenizer.huggingface import is_byte_level, to_bytes
from distgpt.corpus.tokenizer.simple import saved_json
from distgpt.errors import DataError

SPACE = "\u2581"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
LOSSY = "decoded text may differ a little from the original"

ToBytes = Callable[[str], bytes]  # from a token in a vocabulary


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, with which Hugging Face tokenizers encodes.

    Special tokens in a text are ordinary text. The end of a text is one of them, or one more token.
    """

    kind = "huggingface"
    needs_whole_text = True

    def __init__(self, text: str) -> None:
        content = json.loads(text)
        self._json, notes = huggingface.without_unapplied_settings(text, content)
        self._encoder = huggingface.load_encoder(self._json)
        vocab: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        added = {token["id"]: token for token in content.get("added_tokens") or []}
        bytes_of, self._is_lossless, self._starts_with_space = _decoding(content)
        table = [b""] * huggingface.size_of_vocabulary([*vocab.values()])
        for token, id_ in vocab.items():
            table[id_] = token.encode() if id_ in added else bytes_of(token)
        super().__init__(table, huggingface.end_of_text_id(content))
        self.notes = [*notes, *([] if self._is_lossless else [LOSSY])]

    def encode(self, text: str) -> Tokens:
        return np.array(huggingface.encoder_ids(self._encoder, text), dtype=self.dtype)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        return _without_space(super().decode(ids)) if self._starts_with_space else super().decode(ids)

    def check(self, text: str) -> None:
        if self._is_lossless:
            super().check(text)

    def to_json(self) -> str:
        return self._json

    def _with_added_end_of_text(self) -> Self:
        return type(self)(huggingface.with_token(self._json, END_OF_TEXT, self.vocab_size))


class SentencePieceTokenizer(Tokenizer):
    """A model of SentencePiece, which also encodes. The end of a text is its `</s>`, or one more token."""

    kind = "sentencepiece"
    needs_whole_text = True
    notes = (LOSSY,)

    def __init__(self, model: bytes, *, end_of_text: bool) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DataError("it needs the package sentencepiece: pip install sentencepiece") from None
        self._model, self._end_of_text = model, end_of_text
        try:
            self._encoder: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"SentencePiece cannot read it ({error})") from None
        encoder, size = self._encoder, self._encoder.get_piece_size()
        if not size:  # SentencePiece takes an empty file for a model
            raise DataError("it has no tokens")
        table = [_of_sentencepiece(encoder.id_to_piece(id_)) for id_ in range(size)]
        eot_id = encoder.eos_id() if encoder.eos_id() >= 0 else size if end_of_text else None
        super().__init__([*table, END_OF_TEXT.encode()] if eot_id == size else table, eot_id)

    def encode(self, text: str) -> Tokens:
        huggingface.check_utf8(text)
        return np.array(self._encoder.encode(text), dtype=self.dtype)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        return _without_space(super().decode(ids))

    def check(self, text: str) -> None:
        """Do nothing: the ids are those of SentencePiece, which may change a text before it encodes it."""

    def to_json(self) -> str:
        model = base64.b64encode(self._model).decode()
        return saved_json({"kind": self.kind, "model": model, "end_of_text": self._end_of_text})

    def _with_added_end_of_text(self) -> Self:
        return type(self)(self._model, end_of_text=True)


def _decoding(content: Mapping[str, Any]) -> tuple[ToBytes, bool, bool]:
    """Return a function that decodes a token, whether it is lossless, and whether it puts a space before a text."""
    model = content["model"]
    decoders = {decoder["type"]: decoder for decoder in _flat(content.get("decoder") or {}, "decoders")}
    if "ByteLevel" in decoders:
        return (
            lambda token: to_bytes(token) if is_byte_level(token) else token.encode(),
            not content["normalizer"],
            False,
        )
    if model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        marks = ".,!?" if decoders.get("WordPiece", {}).get("cleanup") else ""
        return lambda token: _of_wordpiece(token, prefix, marks), False, True
    if "BPEDecoder" in decoders:
        suffix = decoders["BPEDecoder"]["suffix"]
        return lambda token: token.replace(suffix, " ").encode(), False, False
    if not {"Metaspace", "Replace"} & decoders.keys():
        return lambda token: b" " + token.encode(), False, True
    has_bytes = bool(model.get("byte_fallback"))
    return (_of_sentencepiece if has_bytes else _with_spaces), False, bool({"Metaspace", "Strip"} & decoders.keys())


def _flat(part: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a sequence in a tokenizer.json, or the part itself if it is none."""
    if part.get("type") == "Sequence":
        for inner in part[name]:
            yield from _flat(inner, name)
    elif part:
        yield part


def _with_spaces(token: str) -> bytes:
    return token.replace(SPACE, " ").encode()


def _of_sentencepiece(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes([int(found[1], 16)]) if found else _with_spaces(token)


def _of_wordpiece(token: str, prefix: str, marks: str) -> bytes:
    if token.startswith(prefix):
        return token.removeprefix(prefix).encode()
    return (token if token in marks else f" {token}").encode()


def _without_space(text: str) -> str:
    return text.removeprefix(" ")
