"""The vocabulary in Hugging Face's tokenizer.json: which of these files encode as GPT-2 does, and how.

A vocabulary is byte-level: each byte of a token is written as a printable character.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from distgpt.corpus.tokenizer.base import END_OF_TEXT, MAX_VOCAB_SIZE
from distgpt.errors import DataError

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_OTHER_MODELS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def _byte_to_unicode() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}


BYTE_TO_UNICODE = _byte_to_unicode()
UNICODE_TO_BYTE = {character: value for value, character in BYTE_TO_UNICODE.items()}
_NO_BYTE = "\uffff"
_TO_LATIN = dict.fromkeys(range(256), _NO_BYTE) | {
    ord(character): chr(value) for character, value in UNICODE_TO_BYTE.items()
}


def to_unicode(token: bytes) -> str:
    """Return a token as tokenizer.json writes it."""
    return "".join(map(BYTE_TO_UNICODE.__getitem__, token))


def to_bytes(token: str) -> bytes:
    """Return the bytes of a token of tokenizer.json. Raises DataError if it is not byte-level."""
    try:
        return token.translate(_TO_LATIN).encode("latin-1")
    except UnicodeEncodeError:
        raise DataError(
            f"token {token!r} is not made of GPT-2's byte characters: only byte-level BPE can be read"
        ) from None


def is_byte_level(token: str) -> bool:
    """Return True if all characters of a token stand for bytes."""
    return all(character in UNICODE_TO_BYTE for character in token)


def parents(ranks: Mapping[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """Return the two tokens whose merge makes this one, after all earlier merges are done. Raises DataError."""
    parts = [bytes([value]) for value in token]
    while len(parts) > 2:
        pairs = [(ranks.get(left + right, len(ranks)), i) for i, (left, right) in enumerate(pairwise(parts))]
        rank, i = min(pairs)
        if rank >= ranks[token]:
            raise DataError(f"token {ranks[token]} cannot be made by merging two earlier ones")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def is_made_of(
    ranks: Mapping[bytes, int], made_of: Mapping[bytes, tuple[bytes, bytes]], left: bytes, right: bytes
) -> bool:
    """Return True if merging by rank makes `left + right` of these two tokens, which are made of `made_of` in turn.

    Merges are undone from both sides of the border between the two, the latest first. No pair across the border may
    have an earlier rank. This is `is_valid_token_pair` of the crate `bpe` in github/rust-gems.
    """
    limit = ranks[left + right]
    while ranks.get(left + right, limit) >= limit:
        if len(left) > 1 and ranks[left] > ranks[right]:
            limit, left = ranks[left], made_of[left][1]
        elif len(right) > 1:
            limit, right = ranks[right] + 1, made_of[right][0]
        else:
            return True
    return False


def checked_model(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the BPE model of a tokenizer.json that encodes as GPT-2 does. Raises DataError for another one."""
    model: dict[str, Any] = content.get("model") or {}
    pre = content.get("pre_tokenizer") or {}
    is_plain = not content.get("normalizer") and not any(map(model.get, _OTHER_MODELS))
    is_byte_level = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)
    # Files of 2020, as GPT-2's own, do not name the type.
    is_bpe = model.get("type", "BPE" if "merges" in model else "") == "BPE"
    if not is_bpe or not is_byte_level or not is_plain:
        raise DataError(
            "only byte-level BPE with GPT-2's pattern can be read from a Hugging Face tokenizer.json (a ByteLevel "
            "pre-tokenizer without prefix space, no normalizer, dropout, prefix or suffix)"
        )
    if not set(UNICODE_TO_BYTE) <= set(model["vocab"]):
        raise DataError("the vocabulary lacks some of the 256 single bytes")
    for token in applied_tokens(content):
        # Long texts are cut before a space or a newline, and decoding must give every text back whole.
        if token.get("lstrip") or token.get("rstrip") or re.search(r"\S[ \n]", token["content"]):
            raise DataError(
                f"its added token {token['content']!r} includes the spaces around it or has one after another "
                f"character: such tokens cannot be read"
            )
    return model


def applied_tokens(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens that are searched in a text: those that are not special."""
    added = content.get("added_tokens") or []
    return [token for token in added if not token.get("special") and token["content"] != END_OF_TEXT]


def without_unapplied(text: str, content: dict[str, Any]) -> tuple[str, list[str]]:
    """Remove from a tokenizer.json all that would cut, fill or end a text for other readers; add notes on it."""
    notes = []
    unapplied = [name for name in ("truncation", "padding") if content.get(name)]
    if unapplied:
        notes.append(f"its {' and '.join(unapplied)} will not be applied: every document is tokenized whole")
    if (content.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        notes.append("its post-processor will not be applied: end-of-text is the only token added to a document")
    added = content.get("added_tokens") or []
    changed = [{**token, "special": True} if token["content"] == END_OF_TEXT else token for token in added]
    if unapplied or changed != added:
        text = compact_json({**content, **dict.fromkeys(unapplied), "added_tokens": changed})
    return text, notes


def size_of_vocabulary(ids: Sequence[int]) -> int:
    """Return the size of a vocabulary of these ids. Raises DataError for ids that no token can have."""
    if min(ids) < 0 or max(ids) >= MAX_VOCAB_SIZE:
        raise DataError(
            f"its ids go from {min(ids):,} to {max(ids):,}, and a uint16 token holds 0 to {MAX_VOCAB_SIZE - 1:,}: "
            f"use another tokenizer, or --tokenizer bpe"
        )
    return max(ids) + 1


def compact_json(content: Mapping[str, Any]) -> str:
    """Return a tokenizer.json as Hugging Face tokenizers writes it, on one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def byte_level_json(vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> str:
    """Return the tokenizer.json of a byte-level BPE with GPT-2's pattern."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return compact_json(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }
    )
