"""Text to token ids and back: characters, bytes and byte-level BPE, saved as JSON, never as pickle.

Every tokenizer is lossless: the UTF-8 bytes of its ids, put together, are the bytes of the text. The end-of-text id is
never produced by `encode`: a literal "<|endoftext|>" in a text is ordinary text.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from distgpt.errors import DataError, StorageError, UsageError

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 65_536
FILE_NAME = "tokenizer.json"
FORMAT = "distgpt-tokenizer"
VERSION = 1
LONGEST_WORD = 2048

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

Tokens = npt.NDArray[np.uint16]


class Tokenizer(ABC):
    """Encodes text as ids below `vocab_size`. `table` holds the bytes of each id, end-of-text included.

    `notes` say what its file asks for and does not get, or does not say.
    """

    kind: str
    notes: Sequence[str] = ()

    def __init__(self, table: Sequence[bytes], eot_id: int | None) -> None:
        if len(table) > MAX_VOCAB_SIZE:
            raise DataError(
                f"the vocabulary of {len(table):,} ids does not fit the 65,536 of a uint16 token: "
                f"take --tokenizer bytes, or bpe with a --vocab-size of at most 65536"
            )
        self.vocab_size = len(table)
        self.eot_id = eot_id
        self._table = list(table)

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """The ids of `text`, uint16 (n,). Raises DataError for a character that the vocabulary lacks."""

    @abstractmethod
    def to_json(self) -> str:
        """What tokenizer.json holds; `load_tokenizer` reads it back."""

    @abstractmethod
    def with_end_of_text(self) -> Self:
        """This tokenizer where it has an end-of-text id; otherwise the same with one more id for it, the last."""

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
        """The bytes of these ids: for streaming, where a character may come in several tokens. Raises DataError."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            bad = array[(array < 0) | (array >= self.vocab_size)][0]
            raise DataError(f"token id {bad} is outside the vocabulary of {self.vocab_size}")
        return b"".join(map(self._table.__getitem__, array.tolist()))

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD. Raises DataError."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def check(self, text: str) -> None:
        """Raise DataError where `text` does not come back, or the library that owns the format gives other ids."""
        if self.decode_bytes(self.encode(text)) != text.encode():
            raise DataError("its ids do not give the text back: distgpt cannot use this tokenizer")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        """How many UTF-8 bytes of text each token stands for, int64 (vocab_size,); 0 for end-of-text."""
        sizes = np.array([len(token) for token in self._table], dtype=np.int64)
        if self.eot_id is not None:
            sizes[self.eot_id] = 0
        return sizes


class CharTokenizer(Tokenizer):
    """One id per character, in order of code point, as the seed's `sorted(set(text))`."""

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
            return np.frombuffer(narrow, dtype=np.uint8).astype(np.uint16)
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = self._ids[codes]
        if ids.min() < 0:
            raise self._unknown(text[int(np.argmax(ids < 0))])
        tokens: Tokens = ids.astype(np.uint16)
        return tokens

    def to_json(self) -> str:
        content = {"kind": self.kind, "characters": self.characters, "end_of_text": self.eot_id is not None}
        return _own_json(content)

    def with_end_of_text(self) -> Self:
        return self if self.eot_id is not None else type(self)(self.characters, end_of_text=True)

    def lacks(self, characters: str) -> str:
        """Those of `characters` that the vocabulary does not hold."""
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
        return _own_json({"kind": self.kind, "end_of_text": self.eot_id is not None})

    def with_end_of_text(self) -> Self:
        return self if self.eot_id is not None else type(self)(end_of_text=True)


class BpeTokenizer(Tokenizer):
    """Byte-level BPE with GPT-2's pattern, from the text of a Hugging Face tokenizer.json.

    Encodes with tiktoken, several times faster than Hugging Face's own encoder, which takes over where the merges or
    added tokens do not let tiktoken give the same ids. Only the file decides that, so whoever loads it gets the same
    ids. Special tokens in a text are ordinary text, other added tokens are themselves.
    """

    kind = "bpe"

    def __init__(self, text: str) -> None:
        content = json.loads(text)
        model = _checked_bpe_model(content)
        self._json, self.notes = _without_unapplied(text, content)
        vocab: dict[str, int] = model["vocab"]
        added: dict[int, str] = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
        table = [b""] * _size_of([*vocab.values(), *added])
        for token, id_ in vocab.items():
            if id_ not in added:
                table[id_] = _to_bytes(token)
        for id_, token in added.items():
            table[id_] = token.encode()
        eot_ids = [id_ for id_, token in added.items() if token == END_OF_TEXT]
        super().__init__(table, eot_ids[0] if eot_ids else None)
        # Older files write a merge as "a b", newer ones as ["a", "b"].
        self._merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        self._vocab = vocab
        for left, right in self._merges:
            if not {left, right, left + right} <= vocab.keys():
                raise DataError(f"its merge of {left!r} and {right!r} is not among the tokens of its vocabulary")
        # tiktoken knows a merge by its result: two merges with one result are beyond it.
        self._beyond_ranks = bool(
            model.get("ignore_merges") or _applied(content) or len(self._ranks) != 256 + len(self._merges)
        )

    def encode(self, text: str) -> Tokens:
        if self.is_slow:
            return self._encode_slowly(text)
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            # A run of a million spaces is more than the regular expression engine can backtrack over.
            return self._encode_slowly(text)
        tokens: Tokens = self.ids_of_ranks[ranks]
        return tokens

    @cached_property
    def is_slow(self) -> bool:
        """Whether tiktoken might give other ids than these merges."""
        if self._beyond_ranks:
            return True
        made = (tuple(map(_to_bytes, merge)) for merge in self._merges)
        try:
            # Where every token, encoded by itself, is made of the two parts that its merge names, tiktoken never
            # merges any other two: up to such a step, what is around a token leaves no mark on it.
            return any(_parents(self._ranks, left + right) != (left, right) for left, right in made)
        except DataError:
            return True

    def check(self, text: str) -> None:
        if not self.is_slow:
            ours = self.encode(text).tolist()
            theirs = self._huggingface.encode(text, add_special_tokens=False).ids
            if ours != theirs:
                same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
                at = sum(1 for _ in same)
                raise DataError(
                    f"after {self.decode(ours[:at])[-40:]!r} its ids are {ours[at : at + 5]} here and "
                    f"{theirs[at : at + 5]} with Hugging Face tokenizers: distgpt cannot use this tokenizer"
                )
        super().check(text)

    def to_json(self) -> str:
        return self._json

    def with_end_of_text(self) -> Self:
        if self.eot_id is not None:
            return self
        content = json.loads(self._json)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        id_ = self._vocab.get(END_OF_TEXT, self.vocab_size)
        token = {"id": id_, "content": END_OF_TEXT, **flags, "special": True}
        content["added_tokens"] = [*(content.get("added_tokens") or []), token]
        return type(self)(_compact_json(content))

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        """Token bytes to the priority of the merge that makes them; the 256 single bytes come first."""
        singles = [token for token in self._vocab if token in _UNICODE_TO_BYTE]
        ranks = {_to_bytes(token): rank for rank, token in enumerate(sorted(singles, key=self._vocab.__getitem__))}
        for left, right in self._merges:
            ranks.setdefault(_to_bytes(left + right), len(ranks))
        return ranks

    @cached_property
    def ids_of_ranks(self) -> Tokens:
        id_of = {_to_bytes(token): id_ for token, id_ in self._vocab.items() if _is_byte_level(token)}
        return np.array([id_of[token] for token in self._ranks], dtype=np.uint16)

    @cached_property
    def _encoding(self) -> Any:
        import tiktoken

        return tiktoken.Encoding("distgpt", pat_str=GPT2_PATTERN, mergeable_ranks=self._ranks, special_tokens={})

    @cached_property
    def _huggingface(self) -> Any:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the package raises no other
            raise DataError(f"Hugging Face tokenizers cannot read it ({error})") from None
        tokenizer.encode_special_tokens = True  # as the ordinary text that they are
        return tokenizer

    def _encode_slowly(self, text: str) -> Tokens:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # What Python makes of bytes on the command line that are not UTF-8.
            raise DataError(f"{describe(text[error.start])} in the text is no character: it must be UTF-8") from None
        return np.array(self._huggingface.encode(text, add_special_tokens=False).ids, dtype=np.uint16)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in this file, or in the tokenizer.json of this directory.

    Reads distgpt's own JSON, Hugging Face's tokenizer.json (byte-level BPE with GPT-2's pattern) and .tiktoken files.
    Raises DataError for anything else.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    try:
        return _from_tiktoken(raw) if path.suffix == ".tiktoken" else tokenizer_from_json(raw.decode())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer that distgpt reads: {type(error).__name__}: {error}") from None


def tokenizer_from_json(text: str) -> Tokenizer:
    """The inverse of `to_json`. Raises DataError, or ValueError, KeyError or TypeError for broken JSON."""
    content = json.loads(text)
    if content.get("format") != FORMAT:
        return BpeTokenizer(text)
    if content["version"] != VERSION:
        raise DataError(f"tokenizer format version {content['version']}, this distgpt reads {VERSION}")
    end_of_text = bool(content["end_of_text"])
    if content["kind"] == "char":
        return CharTokenizer(content["characters"], end_of_text=end_of_text)
    if content["kind"] == "bytes":
        return ByteTokenizer(end_of_text=end_of_text)
    raise DataError(f"unknown tokenizer kind {content['kind']!r}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Byte-level BPE of at most `vocab_size` ids learned from these texts, without an end-of-text id."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFace

    tokenizer = HuggingFace(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Learning takes time quadratic in a word's length, which may be a whole line of DNA.
    cut = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([byte_level, cut])
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = byte_level
    return BpeTokenizer(tokenizer.to_str())


def gpt2() -> BpeTokenizer:
    """GPT-2's vocabulary of 50,257, from tiktoken's cache or download. Raises StorageError where neither works."""
    import tiktoken

    try:
        ranks = tiktoken.get_encoding("r50k_base")._mergeable_ranks
    except (OSError, ValueError) as error:
        name = hashlib.sha1(GPT2_URL.encode()).hexdigest()
        cache = os.environ.get("TIKTOKEN_CACHE_DIR")
        raise StorageError(
            f"cannot get GPT-2's vocabulary ({type(error).__name__}): fetch {GPT2_URL} where there is a network and "
            f"store it as {name} in the directory that TIKTOKEN_CACHE_DIR names ({cache or 'not set'}), "
            f"or pass the file itself: --tokenizer r50k_base.tiktoken"
        ) from None
    return bpe_from_ranks(ranks)


def bpe_from_ranks(ranks: Mapping[bytes, int]) -> BpeTokenizer:
    """Byte-level BPE of a tiktoken vocabulary, with end-of-text as the id after its last. Raises DataError."""
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([value]) in ranks for value in range(256)):
        raise DataError("the ranks of a .tiktoken file must be 0, 1, 2, ... and cover all 256 bytes")
    if len(ranks) >= MAX_VOCAB_SIZE:
        raise DataError(f"its {len(ranks):,} tokens and end-of-text do not fit the 65,536 ids of a uint16 token")
    merges = [_parents(ranks, token) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **byte_level},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "vocab": {_to_unicode(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])},
            "merges": [[_to_unicode(left), _to_unicode(right)] for left, right in merges],
        },
    }
    return BpeTokenizer(_compact_json(content)).with_end_of_text()


def from_name(name: str) -> Tokenizer | None:
    """The tokenizer that `--tokenizer name` means, or None where it depends on the corpus (char, bytes, bpe).

    Raises UsageError for a name that is neither a tokenizer nor a file, DataError and StorageError as the loaders do.
    """
    if name in ("char", "bytes", "bpe"):
        return None
    if name == "gpt2":
        return gpt2()
    if not Path(name).exists():
        raise UsageError(f"--tokenizer {name} is neither char, bytes, bpe or gpt2 nor a file that exists")
    return load_tokenizer(Path(name))


def describe(character: str) -> str:
    """A character so that a person can find it: repr and code point."""
    return f"{character!r} (U+{ord(character):04X})"


def _byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}


_BYTE_TO_UNICODE = _byte_to_unicode()
_UNICODE_TO_BYTE = {character: value for value, character in _BYTE_TO_UNICODE.items()}


def _to_unicode(token: bytes) -> str:
    return "".join(map(_BYTE_TO_UNICODE.__getitem__, token))


def _to_bytes(token: str) -> bytes:
    if not _is_byte_level(token):
        raise DataError(f"token {token!r} is not made of GPT-2's byte characters: only byte-level BPE can be read")
    return bytes(map(_UNICODE_TO_BYTE.__getitem__, token))


def _is_byte_level(token: str) -> bool:
    return all(character in _UNICODE_TO_BYTE for character in token)


def _checked_bpe_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """The BPE model of a Hugging Face tokenizer.json that encodes as GPT-2 does. Raises DataError."""
    model: dict[str, Any] = content.get("model") or {}
    pre = content.get("pre_tokenizer") or {}
    plain = not any(
        (content.get("normalizer"), model.get("dropout"), *map(model.get, _AFFIXES)),
    )
    byte_level = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)
    # Files of 2020, as GPT-2's own, do not name the type.
    is_bpe = model.get("type", "BPE" if "merges" in model else "") == "BPE"
    if not is_bpe or not byte_level or not plain:
        raise DataError(
            "only byte-level BPE with GPT-2's pattern can be read from a Hugging Face tokenizer.json (a ByteLevel "
            "pre-tokenizer without prefix space, no normalizer, dropout, prefix or suffix)"
        )
    if not set(_UNICODE_TO_BYTE) <= set(model["vocab"]):
        raise DataError("the vocabulary lacks some of the 256 single bytes")
    for token in _applied(content):
        # Long texts are cut before a space or a newline, and every text is to come back whole.
        if token.get("lstrip") or token.get("rstrip") or re.search(r"\S[ \n]", token["content"]):
            raise DataError(
                f"its added token {token['content']!r} takes the spaces around it or holds one after another "
                f"character: such tokens cannot be read"
            )
    return model


_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def _applied(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens that are looked for in a text: those that are not special."""
    added = content.get("added_tokens") or []
    return [token for token in added if not token.get("special") and token["content"] != END_OF_TEXT]


def _without_unapplied(text: str, content: dict[str, Any]) -> tuple[str, list[str]]:
    """A tokenizer.json without what would cut, fill or end a text for whoever reads it, and what to say of it."""
    notes = []
    unapplied = [name for name in ("truncation", "padding") if content.get(name)]
    if unapplied:
        notes.append(f"its {' and '.join(unapplied)} will not be applied: every document is tokenized whole")
    if (content.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        notes.append(
            "its post-processor will not be applied: end-of-text is the only token that is added to a document"
        )
    added = content.get("added_tokens") or []
    changed = [{**token, "special": True} if token["content"] == END_OF_TEXT else token for token in added]
    if unapplied or changed != added:
        text = _compact_json({**content, **dict.fromkeys(unapplied), "added_tokens": changed})
    return text, notes


def _size_of(ids: Sequence[int]) -> int:
    """The size of a vocabulary of these ids. Raises DataError for ids that no token can have."""
    if min(ids) < 0 or max(ids) >= MAX_VOCAB_SIZE:
        raise DataError(
            f"its ids go from {min(ids):,} to {max(ids):,}, and a uint16 token holds 0 to {MAX_VOCAB_SIZE - 1:,}: "
            f"take another tokenizer, or --tokenizer bpe"
        )
    return max(ids) + 1


def _from_tiktoken(raw: bytes) -> BpeTokenizer:
    """The tokenizer of a .tiktoken file, which does not say how a text is split into words. Raises DataError."""
    tokenizer = bpe_from_ranks(_parse_ranks(raw))
    if hashlib.sha256(raw).hexdigest() != GPT2_SHA256:
        _check_words(tokenizer)
        tokenizer.notes = ["a .tiktoken file does not say how it splits a text into words: taking GPT-2's pattern"]
    return tokenizer


def _check_words(tokenizer: BpeTokenizer) -> None:
    """Raise DataError where a token is no part of a word of GPT-2's pattern: it was made with another pattern."""
    for id_ in range(tokenizer.vocab_size):
        with contextlib.suppress(UnicodeDecodeError):  # a part of a character, of which the pattern says nothing
            token = tokenizer.decode_bytes([id_]).decode()
            if id_ != tokenizer.eot_id and token not in _PARTS_OF_SUFFIXES and tokenizer.encode(token).size != 1:
                raise DataError(
                    f"token {id_}, {token!r}, crosses the words of GPT-2's pattern: the file was made for another "
                    f"pattern, which distgpt does not read; take --tokenizer bpe to learn a vocabulary"
                )


# Of the suffixes 'll, 've and 're, which are one word only when whole.
_PARTS_OF_SUFFIXES = ("'l", "'v", "'r")


def _parse_ranks(raw: bytes) -> dict[bytes, int]:
    """Lines of `base64 rank`."""
    try:
        pairs = (line.split() for line in raw.splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise DataError("a .tiktoken file has lines of a base64 token and its rank") from None


def _parents(ranks: Mapping[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes this one: what is left when only earlier merges are done. Raises DataError."""
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        pairs = [(ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(pairwise(parts))]
        rank, i = min(pairs)
        if rank >= ranks[token]:
            raise DataError(f"token {ranks[token]} cannot be made by merging two earlier ones")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _own_json(content: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1) + "\n"


def _compact_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
