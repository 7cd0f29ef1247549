"""Load a tokenizer by its name, or from a file of distgpt, Hugging Face, SentencePiece or tiktoken."""

import base64
import binascii
import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import orjson

from distgpt.corpus.tokenizer.base import MAX_VOCAB_SIZE, Tokenizer
from distgpt.corpus.tokenizer.bpe import BpeTokenizer
from distgpt.corpus.tokenizer.exported import characters_from
from distgpt.corpus.tokenizer.huggingface import (
    GPT2_PATTERN,
    PATTERNS,
    byte_level_json,
    parents,
    pattern_of,
    to_unicode,
)
from distgpt.corpus.tokenizer.libraries import HuggingFaceTokenizer, SentencePieceTokenizer
from distgpt.corpus.tokenizer.simple import FORMAT, simple_from_json
from distgpt.errors import DataError, StorageError, UsageError, did_you_mean, did_you_mean_path

FILE_NAME = "tokenizer.json"
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# Parts of the suffixes 'll, 've and 're. A suffix is one word, but such a part is two.
_PARTS_OF_SUFFIXES = ("'l", "'v", "'r")

NAMES = ("char", "bytes", "bpe", "gpt2")

# The largest share of a vocabulary that may not fit the pattern that the user named.
MAX_WRONG_SHARE = 0.01


def load_tokenizer(path: Path, pattern: str = "") -> Tokenizer:
    """Load the tokenizer in this file, or in the tokenizer.json of this directory.

    Reads distgpt's own JSON, Hugging Face's tokenizer.json, SentencePiece's .model and .tiktoken files. `pattern`:
    the name of the pattern that splits text into words for a .tiktoken file. Raises DataError for anything else.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    try:
        if path.suffix == ".tiktoken":
            return _from_tiktoken(raw, pattern)
        if path.suffix == ".model":
            return SentencePieceTokenizer(raw, end_of_text=False)
        return tokenizer_from_json(raw.decode())
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"{path} is not a tokenizer that distgpt reads: {type(error).__name__}: {error}") from None


def tokenizer_from_json(text: str) -> Tokenizer:
    """Return the tokenizer whose `to_json` this is. Raises DataError, or ValueError, KeyError, TypeError: bad JSON."""
    content = orjson.loads(text)
    if content.get("format") == FORMAT and content.get("kind") == SentencePieceTokenizer.kind:
        model = base64.b64decode(content["model"])
        return SentencePieceTokenizer(model, end_of_text=bool(content["end_of_text"]))
    if content.get("format") == FORMAT:
        return simple_from_json(content)
    if characters := characters_from(content):
        return characters
    return BpeTokenizer(text) if pattern_of(content) else HuggingFaceTokenizer(text)


def given_tokenizer(name: str, pattern: str = "") -> Tokenizer | None:
    """Return the tokenizer in the file that `--tokenizer name` means; None for char, bytes, bpe and gpt2.

    `pattern`: as for `load_tokenizer`. Raises UsageError if there is no such file, DataError as
    `load_tokenizer` does.
    """
    if name in NAMES:
        return None
    if not Path(name).exists():
        hint = did_you_mean(name.lower(), NAMES) or did_you_mean_path(Path(name))
        raise UsageError(f"--tokenizer {name} is neither char, bytes, bpe or gpt2 nor a file that exists{hint}")
    return load_tokenizer(Path(name), pattern)


def gpt2() -> BpeTokenizer:
    """Return GPT-2's vocabulary of 50,257, from tiktoken's cache or a download. Raises StorageError without both.

    Raises UsageError if tiktoken is not installed.
    """
    try:
        import tiktoken
    except ImportError:
        raise UsageError(
            "--tokenizer gpt2 needs the package tiktoken: pip install tiktoken, "
            f"or pass the file itself, from {GPT2_URL}: --tokenizer r50k_base.tiktoken"
        ) from None
    try:
        ranks = tiktoken.get_encoding("r50k_base")._mergeable_ranks
    except (OSError, ValueError) as error:
        name = hashlib.sha1(GPT2_URL.encode()).hexdigest()
        cache = os.environ.get("TIKTOKEN_CACHE_DIR")
        raise StorageError(
            f"cannot get GPT-2's vocabulary ({type(error).__name__}): fetch {GPT2_URL} on a machine with a network and "
            f"store it as {name} in the directory that TIKTOKEN_CACHE_DIR names ({cache or 'not set'}), "
            f"or pass the file itself: --tokenizer r50k_base.tiktoken"
        ) from None
    return _from_ranks(ranks, GPT2_PATTERN)


def _from_tiktoken(raw: bytes, pattern: str) -> BpeTokenizer:
    """Return the tokenizer of a .tiktoken file, which does not tell how to split text into words. Raises DataError."""
    tokenizer = _from_ranks(_parse_ranks(raw), PATTERNS[pattern or "gpt2"])
    if hashlib.sha256(raw).hexdigest() != GPT2_SHA256:
        _check_words(tokenizer, pattern)
        if not pattern:
            tokenizer.notes = ["a .tiktoken file does not say how it splits a text into words: using GPT-2's pattern"]
    return tokenizer


def _from_ranks(ranks: Mapping[bytes, int], pattern: str) -> BpeTokenizer:
    """Return the tokenizer of a tiktoken vocabulary, with end-of-text as the id after its last. Raises DataError."""
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([value]) in ranks for value in range(256)):
        raise DataError("the ranks of a .tiktoken file must be 0, 1, 2, ... and cover all 256 bytes")
    if len(ranks) >= MAX_VOCAB_SIZE:
        raise DataError(f"it has {len(ranks):,} tokens, and distgpt reads at most {MAX_VOCAB_SIZE - 1:,}")
    merges = [parents(ranks, token) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    vocab = {to_unicode(token): rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])}
    content = byte_level_json(vocab, [[to_unicode(left), to_unicode(right)] for left, right in merges], pattern)
    return BpeTokenizer(content).with_end_of_text()


def _check_words(tokenizer: BpeTokenizer, pattern: str) -> None:
    """Raise DataError if tokens span several words of this pattern: then the file was made with another one.

    If the user named the pattern, the share MAX_WRONG_SHARE of them may do so.
    """
    wrong = []
    for id_ in range(tokenizer.vocab_size):
        with contextlib.suppress(UnicodeDecodeError):  # a part of a character, which the pattern does not concern
            token = tokenizer.decode_bytes([id_]).decode()
            if id_ != tokenizer.eot_id and token not in _PARTS_OF_SUFFIXES and tokenizer.encode(token).size != 1:
                wrong.append((id_, token))
    if len(wrong) > (MAX_WRONG_SHARE * tokenizer.vocab_size if pattern else 0):
        id_, token = wrong[0]
        raise DataError(
            f"token {id_}, {token!r}, spans several words of the pattern {pattern or 'gpt2'}: the file was made for "
            f"another one; name it with --bpe-pattern {'|'.join(PATTERNS)}"
        )


def _parse_ranks(raw: bytes) -> dict[bytes, int]:
    """Parse lines of `base64 rank`."""
    try:
        pairs = (line.split() for line in raw.splitlines() if line)
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise DataError("a .tiktoken file has lines of a base64 token and its rank") from None
