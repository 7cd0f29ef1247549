"""Byte-level vocabularies: GPT-2's printable character for each byte, and the merges behind a token."""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from distgpt.errors import DataError

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def _byte_to_unicode() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(others)}


BYTE_TO_UNICODE = _byte_to_unicode()
UNICODE_TO_BYTE = {character: value for value, character in BYTE_TO_UNICODE.items()}


def to_unicode(token: bytes) -> str:
    """Return a token as tokenizer.json writes it."""
    return "".join(map(BYTE_TO_UNICODE.__getitem__, token))


def to_bytes(token: str) -> bytes:
    """Return the bytes of a token of tokenizer.json. Raises DataError if it is not byte-level."""
    if not is_byte_level(token):
        raise DataError(f"token {token!r} is not made of GPT-2's byte characters: only byte-level BPE can be read")
    return bytes(map(UNICODE_TO_BYTE.__getitem__, token))


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


def compact_json(content: Mapping[str, Any]) -> str:
    """Return a tokenizer.json as Hugging Face tokenizers writes it, on one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
