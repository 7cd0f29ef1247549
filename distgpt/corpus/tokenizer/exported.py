"""A tokenizer.json of each kind of tokenizer, for programs that read no other file. It gives the same ids."""

import json
from collections.abc import Mapping
from typing import Any

from distgpt.corpus.tokenizer.base import END_OF_TEXT, Tokenizer
from distgpt.corpus.tokenizer.huggingface import (
    BYTE_TO_UNICODE,
    GPT2_PATTERN,
    byte_level_json,
    compact_json,
    with_token,
)
from distgpt.corpus.tokenizer.simple import ByteTokenizer, CharTokenizer

# Each character is a word. A character without an id is an error there as well, since there is no unknown token.
_CHARACTERS: dict[str, Any] = {
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "Fuse"},
}


def to_hugging_face(tokenizer: Tokenizer) -> str:
    """Return a tokenizer.json with which Hugging Face tokenizers gives the same ids; it adds no special tokens.

    An end-of-text token that is spelled out in a text becomes one there; here it is ordinary text.
    """
    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: id_ for id_, character in enumerate(tokenizer.characters)}
        nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": ""}
        text = compact_json({"version": "1.0", "added_tokens": [], **nothing, **_CHARACTERS, "model": model})
        return text if tokenizer.eot_id is None else with_token(text, END_OF_TEXT, tokenizer.eot_id)
    if isinstance(tokenizer, ByteTokenizer):
        text = byte_level_json({BYTE_TO_UNICODE[value]: value for value in range(256)}, [], GPT2_PATTERN)
        return text if tokenizer.eot_id is None else with_token(text, END_OF_TEXT, tokenizer.eot_id)
    content = json.loads(tokenizer.to_json())
    if (content.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        content["post_processor"] = None  # distgpt does not apply it either
    return compact_json(content)


def characters_from(content: Mapping[str, Any]) -> CharTokenizer | None:
    """Return the char tokenizer whose `to_hugging_face` this is, None if it is of another kind."""
    model = content.get("model") or {}
    if model.get("type") != "WordLevel" or any(content.get(key) != value for key, value in _CHARACTERS.items()):
        return None
    vocab, added = model["vocab"], content.get("added_tokens") or []
    tokenizer = CharTokenizer(vocab, end_of_text=bool(added))
    expected = {character: id_ for id_, character in enumerate(tokenizer.characters)}
    ends = [(END_OF_TEXT, len(expected))] if added else []
    same = vocab == expected and [(token["content"], token["id"]) for token in added] == ends
    return tokenizer if same and not content.get("normalizer") else None
