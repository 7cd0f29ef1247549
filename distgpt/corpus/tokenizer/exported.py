"""Tokenizers as files of Hugging Face tokenizers that give the same ids, for programs that read no other."""

import json
from collections.abc import Mapping
from typing import Any

from distgpt.corpus.tokenizer.base import END_OF_TEXT, Tokenizer
from distgpt.corpus.tokenizer.huggingface import BYTE_TO_UNICODE, compact_json
from distgpt.corpus.tokenizer.simple import ByteTokenizer, CharTokenizer

# Each character is a word. A character without an id is an error there as well, since there is no unknown token.
_CHARACTERS: dict[str, Any] = {
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "Fuse"},
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def to_hugging_face(tokenizer: Tokenizer) -> str:
    """Return a tokenizer.json with which Hugging Face tokenizers gives the same ids; it adds no special tokens.

    An end-of-text token that is spelled out in a text becomes one there; here it is ordinary text.
    """
    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: id_ for id_, character in enumerate(tokenizer.characters)}
        return _new(tokenizer, **_CHARACTERS, model={"type": "WordLevel", "vocab": vocab, "unk_token": ""})
    if isinstance(tokenizer, ByteTokenizer):
        vocab = {BYTE_TO_UNICODE[value]: value for value in range(256)}
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        return _new(tokenizer, pre_tokenizer=_BYTE_LEVEL, decoder=_BYTE_LEVEL, model=model)
    content = json.loads(tokenizer.to_json())
    if (content.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        content["post_processor"] = None  # distgpt does not apply it either
    return compact_json(content)


def characters_from(content: Mapping[str, Any]) -> CharTokenizer | None:
    """Return the tokenizer whose `to_hugging_face` this is, if it is one of characters."""
    model = content.get("model") or {}
    if model.get("type") != "WordLevel" or any(content.get(key) != value for key, value in _CHARACTERS.items()):
        return None
    vocab, added = model["vocab"], content.get("added_tokens") or []
    tokenizer = CharTokenizer(vocab, end_of_text=bool(added))
    expected = {character: id_ for id_, character in enumerate(tokenizer.characters)}
    ends = [(END_OF_TEXT, len(expected))] if added else []
    same = vocab == expected and [(token["content"], token["id"]) for token in added] == ends
    return tokenizer if same and not content.get("normalizer") else None


def _new(tokenizer: Tokenizer, **parts: Any) -> str:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = {"id": tokenizer.eot_id, "content": END_OF_TEXT, **flags, "special": True}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return compact_json(
        {"version": "1.0", "added_tokens": [] if tokenizer.eot_id is None else [end], **nothing, **parts}
    )
