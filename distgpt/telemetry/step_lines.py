"""metrics.jsonl and samples.jsonl as they are read: JSON objects with a step, one a line. Imports no torch."""

import json
import os
from pathlib import Path
from typing import Any

from distgpt.errors import StorageError

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
# Bytes at the end of a file in which the newest line is looked for.
END_BYTES = 2**18


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics.jsonl or samples.jsonl. Raises StorageError if it cannot be read."""
    try:
        return [values for values, _ in _whole_lines(file.read_bytes())]
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from error


def newest_line(file: Path, name: str) -> dict[str, Any]:
    """Return the newest complete line that has this figure; empty if there is none near the end of the file."""
    try:
        with open(file, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - END_BYTES))
            content = stream.read()
    except OSError:
        return {}
    # Its text is looked for, since to parse all lines takes longer.
    at = content.rfind(f'"{name}":'.encode(), 0, content.rfind(b"\n") + 1)
    lines = _whole_lines(content[content.rfind(b"\n", 0, at) + 1 : content.find(b"\n", at) + 1]) if at >= 0 else []
    return lines[0][0] if lines else {}


def end_of_step(content: bytes, step: int) -> int:
    """Return the length of metrics.jsonl up to the last line of `step`; 0 if `step` is 0.

    Steps grow from line to line, so a run that resumes at `step` writes all later lines again.
    """
    return max((end for values, end in _whole_lines(content) if values["step"] <= step), default=0) if step else 0


def _whole_lines(content: bytes) -> list[tuple[dict[str, Any], int]]:
    """Return the objects of the complete, undamaged lines, each with the byte offset of the end of its line."""
    objects: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(values, dict) and isinstance(values.get("step"), int):
            objects.append((values, end))
    return objects
