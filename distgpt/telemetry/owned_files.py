"""Writes to a run directory that an earlier owner cannot damage, and that leave no incomplete record.

An earlier owner may have been suspended and wake up in the middle of a write. A file that it has open is no longer the
one at its path, since the next owner replaces each file by a copy. Its renames fail, since the next owner has removed
its staging file. `require_owned` is called before each write, see `RunSession.require_owned`.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def open_for_appending(path: Path, *, require_owned: Callable[[], object], keep: Callable[[bytes], int] = len) -> int:
    """Replace a file, which need not exist, by a copy of its first `keep(content)` bytes; return its descriptor.

    If a full disk has no space for a copy, the file itself is truncated. Raises OSError.
    """
    require_owned()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with open(os.dup(file), "rb") as earlier:
        content = earlier.read()
    end = keep(content)
    try:
        copy = replace_file(path, content[:end], require_owned=require_owned)
    except OSError:
        require_owned()
        os.ftruncate(file, end)
        os.fsync(file)
        return file
    os.close(file)
    return copy


def replace_file(path: Path, content: bytes, *, require_owned: Callable[[], object]) -> int:
    """Replace `path` by a new file and return its descriptor. Raises OSError and keeps the old file."""
    require_owned()
    staged = path.with_name(f".staged.{os.getpid()}.tmp")
    file = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    try:
        append_or_undo(file, content)
        os.fsync(file)
        require_owned()
        os.replace(staged, path)
    except BaseException:
        os.close(file)
        staged.unlink(missing_ok=True)
        require_owned()  # raises if the staging file is gone because another process took over
        raise
    return file


def append_or_undo(file: int, data: bytes) -> None:
    """Append `data` to a file open with O_APPEND. If that fails, remove the part written and raise OSError."""
    end = os.fstat(file).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        # An incomplete record would make the next one unreadable.
        with suppress(OSError):
            os.ftruncate(file, end)
        raise
