"""JSON: where lines or an array of objects can be cut, the text in an object, and what makes it bad."""

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

from distgpt.corpus.reading import sources, streams
from distgpt.corpus.reading.sources import Checked
from distgpt.corpus.reading.streams import SourceBytes, windows

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}"]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


def cut_lines(content: SourceBytes, target: int) -> int:
    """Return the offset of the first line that begins after `target`, or the end of the content."""
    for position, window in windows(content, target, 0):
        if end := window.find(b"\n") + 1:
            return position + end
    return content.end


def cut_objects(content: SourceBytes, start: int) -> int:
    """Return the end of the first object that ends UNIT_BYTES after `start`, or of the content; `start` is in none."""
    size = sources.UNIT_BYTES + streams.WINDOW_BYTES
    while True:
        window = content.peek(start, size)
        for end in _ends(window):
            if end >= sources.UNIT_BYTES:
                return start + end
        if len(window) < size:
            return content.end
        size *= 2


def split_objects(raw: bytes) -> Iterator[bytes]:
    """Yield the objects in a part of a JSON array, or one after another; also anything else in place of one."""
    start = 0
    for end in _ends(raw):
        yield raw[start:end].lstrip(b"[, \t\r\n")
        start = end
    if rest := raw[start:].strip(b"[], \t\r\n"):
        yield rest


def text_of(key: str, raw: bytes) -> Checked:
    """Return the text that has this key in an object of JSON. An empty line is an empty text."""
    if not raw or raw.isspace():
        return "", ""
    try:
        text = _value(orjson.loads(raw), key)
    except (ValueError, KeyError, TypeError):
        return _odd_text_of(key, raw)
    return (text, "") if isinstance(text, str) else _odd_text_of(key, raw)


def _odd_text_of(key: str, raw: bytes) -> Checked:
    """Do the same for objects that the strict and fast reader refuses: with NaN, half a surrogate pair, or bad ones."""
    wrong = ""
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        line, wrong = raw.decode(errors="replace"), f"not UTF-8, byte {error.start:,} of the line ({error.reason})"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        # All of an array of strings comes as one entry.
        return "", wrong or ("not a JSON object but str" if line.startswith('"') else f"not JSON ({error})")
    if not isinstance(content, dict):
        return "", wrong or f"not a JSON object but {type(content).__name__}"
    try:
        text = _value(content, key)
    except (KeyError, TypeError):
        keys = ", ".join(sorted(content)[:8]) or "none"
        return "", wrong or f"no key {key!r} (there are: {keys}); --text-key names the one to read"
    if not isinstance(text, str):
        return "", wrong or f"{key!r} is not a text but {type(text).__name__}"
    if half := _SURROGATE.search(text):
        text, wrong = _SURROGATE.sub("\ufffd", text), wrong or f"{key!r} holds half a character (U+{ord(half[0]):04X})"
    return text, wrong


def _value(content: Any, key: str) -> Any:
    """Return the value of a key, or with dots in it, of keys in nested objects. Raises KeyError, TypeError."""
    if key in content or "." not in key:
        return content[key]
    first, _, rest = key.partition(".")
    return _value(content[first], rest)


def _ends(raw: bytes) -> Iterator[int]:
    """Yield the end of each outermost object, up to a string that has no end."""
    level = 0
    for token in _TOKEN.finditer(raw):
        if token[0] == b'"':
            return
        if token[0] == b"{":
            level += 1
        elif token[0] == b"}":
            level = max(level - 1, 0)
            if level == 0:
                yield token.end()
