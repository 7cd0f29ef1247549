"""Hugging Face's tokenizer.json: which of these files are byte-level BPE, and what all of them have in common.

A vocabulary is byte-level if each byte of a token is written as a printable character.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from distgpt.corpus.tokenizer.base import END_OF_TEXT, MAX_VOCAB_SIZE, describe
from distgpt.errors import DataError, Interrupted

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_UNSUPPORTED_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
_GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# The names that models give to the token at the end of a text; the first one found is taken.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
# The patterns that cut a text into words, by name; tokens never span two words. Llama 3 took the pattern of GPT-4.
PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "gpt4": _GPT4_PATTERN,
    "llama3": _GPT4_PATTERN,
    "gpt4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen": _GPT4_PATTERN.replace("{1,3}", ""),
}


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


def pattern_of(content: Mapping[str, Any]) -> str:
    """Return the pattern by which a tokenizer.json cuts a text into words, if it is byte-level BPE that bpe.py encodes.

    Returns "" for all other files.
    """
    model = content.get("model") or {}
    # Files of 2020, as GPT-2's own, do not name the type.
    is_bpe = model.get("type", "BPE" if "merges" in model else "") == "BPE"
    if not is_bpe or content.get("normalizer") or any(map(model.get, _UNSUPPORTED_OPTIONS)):
        return ""
    for token in applied_tokens(content):
        # Long texts are cut before a space or a newline, and decoding must give every text back whole.
        if token.get("lstrip") or token.get("rstrip") or re.search(r"\S[ \n]", token["content"]):
            return ""
    pre = content.get("pre_tokenizer") or {}
    first, *others = pre.get("pretokenizers") or [None]
    if first is None:
        return GPT2_PATTERN if _is_byte_level(pre, use_regex=True) else ""
    if first.get("type") != "Split" or first.get("behavior") != "Isolated" or first.get("invert"):
        return ""
    pattern: str = (first.get("pattern") or {}).get("Regex", "")
    is_known = pattern in PATTERNS.values() and len(others) == 1 and _is_byte_level(others[0], use_regex=False)
    return pattern if is_known else ""


def _is_byte_level(pre: Mapping[str, Any], *, use_regex: bool) -> bool:
    is_plain = not pre.get("add_prefix_space") and pre.get("use_regex", True) == use_regex
    return pre.get("type") == "ByteLevel" and is_plain


def applied_tokens(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens that are looked for in a text: those that are not special."""
    added = content.get("added_tokens") or []
    return [token for token in added if not token.get("special") and token["content"] != END_OF_TEXT]


def end_of_text_id(content: Mapping[str, Any]) -> int | None:
    """Return the id of the token that ends a text, None if no token has a known name for that.

    A tokenizer with GPT-2's pattern must have GPT-2's name for it.
    """
    names = ENDS if pattern_of(content) != GPT2_PATTERN else (END_OF_TEXT,)
    ids = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    return next((ids[name] for name in names if name in ids), None)


def without_unapplied_settings(text: str, content: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a tokenizer.json without truncation and padding, and notes on the settings that distgpt does not apply."""
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
            f"its ids go from {min(ids):,} to {max(ids):,}, and distgpt reads 0 to {MAX_VOCAB_SIZE - 1:,}: "
            f"use another tokenizer, or --tokenizer bpe"
        )
    return max(ids) + 1


def compact_json(content: Mapping[str, Any]) -> str:
    """Return a tokenizer.json as Hugging Face tokenizers writes it, on one line."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def byte_level_json(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], pattern: str) -> str:
    """Return the tokenizer.json of a byte-level BPE with this pattern."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre: dict[str, Any] = byte_level
    if pattern != GPT2_PATTERN:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [split, {**byte_level, "use_regex": False}]}
    return compact_json(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": pre,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }
    )


def load_encoder(text: str) -> Any:
    """Load Hugging Face's encoder of a tokenizer.json. Special tokens in a text are ordinary text. Raises DataError."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Interrupted:  # raised by a signal
        raise
    except Exception as error:  # the package raises no other
        raise DataError(f"Hugging Face tokenizers cannot read it ({error})") from None
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_utf8(text: str) -> None:
    """Raise DataError for a text that cannot be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Python makes such characters of bytes on the command line that are not UTF-8.
        raise DataError(f"{describe(text[error.start])} in the text is not a character: it must be UTF-8") from None


def encoder_ids(encoder: Any, text: str) -> list[int]:
    """Return the ids that Hugging Face tokenizers gives. Raises DataError for what is not UTF-8."""
    check_utf8(text)
    ids: list[int] = encoder.encode(text, add_special_tokens=False).ids
    return ids


def with_token(text: str, token: str, id_: int) -> str:
    """Return a tokenizer.json with one more special token."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    known = json.loads(text)
    added = [*(known.get("added_tokens") or []), {"id": id_, "content": token, **flags, "special": True}]
    return compact_json({**known, "added_tokens": added})
