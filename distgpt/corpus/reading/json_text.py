"""JSON: where to cut lines or an array of objects, and the text in an object, or why it has none."""

import json
import re
from collections.abc import Iterator
from typing import Any

import orjson

from distgpt.corpus.reading import sources, streams
from distgpt.corpus.reading.sources import CheckedText
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
    """Return the end of the first object that ends UNIT_BYTES or more after `start`, else the end of the content.

    `start` lies between two objects.
    """
    size = sources.UNIT_BYTES + streams.WINDOW_BYTES
    while True:
        window = content.peek(start, size)
        for end in _object_ends(window):
            if end >= sources.UNIT_BYTES:
                return start + end
        if len(window) < size:
            return content.end
        size *= 2


def split_lines(raw: bytes) -> Iterator[bytes]:
    """Yield the lines without their ends, each copied only when it is to be parsed."""
    start = 0
    while (end := raw.find(b"\n", start)) >= 0:
        yield raw[start:end]
        start = end + 1
    if start < len(raw) or not raw:
        yield raw[start:]


def split_objects(raw: bytes) -> Iterator[bytes]:
    """Yield the objects of an array, or of a sequence of objects, and whatever stands in place of an object."""
    start = 0
    for end in _object_ends(raw):
        yield raw[start:end].lstrip(b"[, \t\r\n")
        start = end
    if rest := raw[start:].strip(b"[], \t\r\n"):
        yield rest


def text_of(key: str, raw: bytes) -> CheckedText:
    """Return the text under this key of a JSON object. An empty line is an empty text."""
    if not raw or raw.isspace():
        return "", ""
    try:
        text = _value(orjson.loads(raw), key)
    except (ValueError, KeyError, TypeError):
        return _lenient_text_of(key, raw)
    return (text, "") if isinstance(text, str) else _lenient_text_of(key, raw)


def _lenient_text_of(key: str, raw: bytes) -> CheckedText:
    """Do the same with Python's parser, for what orjson refuses: NaN, a lone surrogate, or a bad document."""
    reason = ""
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        line, reason = raw.decode(errors="replace"), f"not UTF-8, byte {error.start:,} of the line ({error.reason})"
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        # split_objects yields an array of strings as one entry, without its brackets.
        return "", reason or ("not a JSON object but str" if line.startswith('"') else f"not JSON ({error})")
    if not isinstance(content, dict):
        return "", reason or f"not a JSON object but {type(content).__name__}"
    try:
        text = _value(content, key)
    except (KeyError, TypeError):
        keys = ", ".join(sorted(content)[:8]) or "none"
        return "", reason or f"no key {key!r} (there are: {keys}); --text-key names the one to read"
    if not isinstance(text, str):
        return "", reason or f"{key!r} is not a string but {type(text).__name__}"
    if lone := _SURROGATE.search(text):
        text = _SURROGATE.sub("\ufffd", text)
        reason = reason or f"{key!r} holds a lone surrogate (U+{ord(lone[0]):04X})"
    return text, reason


def _value(content: Any, key: str) -> Any:
    """Return the value of a key; a key with dots may name one in nested objects. Raises KeyError, TypeError."""
    if key in content or "." not in key:
        return content[key]
    first, _, rest = key.partition(".")
    return _value(content[first], rest)


def _object_ends(raw: bytes) -> Iterator[int]:
    """Yield the end of each outermost object, up to a string that is not closed."""
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
