"""TensorBoard's event files, written record by record.

Not by torch's SummaryWriter: its thread leaves half a record behind on a full disk, stays broken when there is space
again, prints tracebacks and raises into training; it also takes seconds to import. Needs no more than tensorboard.
"""

import io
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.record_writer import RecordWriter

STAMP = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class EventFile:
    """A new event file in `directory`; what earlier files hold from `first_step` on is hidden.

    Each method appends one record or raises OSError and leaves the file as it was, so that later records are read.
    `require_owned` is called before each write.
    """

    def __init__(self, directory: Path, *, first_step: int, require_owned: Callable[[], object]) -> None:
        self._require_owned = require_owned
        # TensorBoard reads the files of a directory by name, and a clock may have been set back since the last one.
        earlier = {int(match[1]): file for file in directory.glob("*") if (match := STAMP.match(file.name))}
        stamp = max([time.time_ns() // 10**9, *(stamp + 1 for stamp in earlier)])
        if earlier:
            put_anew(earlier[max(earlier)], require_owned=require_owned)
        self._path = directory / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._first_step = first_step
        self._file: int | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of several curves at the same step."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def text(self, tag: str, text: str, step: int) -> None:
        """A text, shown verbatim."""
        longest = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        markdown = TensorProto(
            dtype="DT_STRING",
            string_val=[f"{fence}\n{text}\n{fence}".encode(errors="replace")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=kind, tensor=markdown)
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))

    def close(self) -> None:
        """Close the file; every record is already written."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, event: Any) -> None:
        if self._file is None:
            self._file = self._opened()
        record = _record(event)
        self._require_owned()
        append_whole(self._file, record)

    def _opened(self) -> int:
        """The file with the records that must come first."""
        now = time.time()
        version = Event(wall_time=now, file_version="brain.Event:2")
        start = Event(wall_time=now, step=self._first_step, session_log=SessionLog(status=SessionLog.START))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return put_in_place(self._path, _record(version) + _record(start), require_owned=self._require_owned)


def put_in_place(path: Path, content: bytes, *, require_owned: Callable[[], object]) -> int:
    """Give a new file this name; it is open for appending. Raises OSError and leaves what had the name.

    An earlier owner of the run directory, who was asleep, can change nothing any more: in a file that it has open it
    writes to what nobody reads, and its rename of a file fails, whose staged one the next owner removed.
    """
    require_owned()
    staged = path.with_name(f".staged.{os.getpid()}.tmp")
    file = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
    try:
        append_whole(file, content)
        os.fsync(file)
        require_owned()
        os.replace(staged, path)
    except BaseException:
        os.close(file)
        staged.unlink(missing_ok=True)
        require_owned()  # a staged file that has gone was taken by the next owner
        raise
    return file


def put_anew(path: Path, *, require_owned: Callable[[], object]) -> None:
    """Put a copy of a file in its place, so that no earlier owner of the run directory adds to it."""
    with suppress(OSError):  # a full disk has no room for a copy
        os.close(put_in_place(path, path.read_bytes(), require_owned=require_owned))


def append_whole(file: int, data: bytes) -> None:
    """Append all of `data` to a file open with O_APPEND, or nothing and raise OSError."""
    end = os.fstat(file).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(file, data[written:])
    except OSError:
        # What was written would spoil the next record as well.
        with suppress(OSError):
            os.ftruncate(file, end)
        raise


def _record(event: Any) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
