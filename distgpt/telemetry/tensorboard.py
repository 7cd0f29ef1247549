"""A writer of TensorBoard's event files, record by record.

torch's SummaryWriter is not used: on a full disk its thread leaves an incomplete record, prints tracebacks, raises into
training and does not recover when there is space again. It also takes seconds to import.
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
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from distgpt.telemetry.owned_files import append_or_undo, open_for_appending, replace_file

FILE_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")


class EventFile:
    """A new event file in `directory`. TensorBoard hides the steps of earlier files from `first_step` on.

    Each method appends one record. If that fails, it raises OSError and leaves the file as it was, so that later
    records can be read. `require_owned` is called before each write.
    """

    def __init__(self, directory: Path, *, first_step: int, require_owned: Callable[[], object]) -> None:
        self._require_owned = require_owned
        # TensorBoard reads the files in the order of their names, and the clock may have been set back.
        earlier = {int(match[1]): file for file in directory.glob("*") if (match := FILE_NAME.match(file.name))}
        stamp = max([time.time_ns() // 10**9, *(stamp + 1 for stamp in earlier)])
        if earlier:
            with suppress(OSError):
                os.close(open_for_appending(earlier[max(earlier)], require_owned=require_owned))
        self._path = directory / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._first_step = first_step
        self._file: int | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each of several curves."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.summary(Summary(value=points), step)

    def summary(self, summary: Summary, step: int) -> None:
        """Add a record of dashboard.py."""
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text, which TensorBoard shows verbatim."""
        longest = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        markdown = f"{fence}\n{text}\n{fence}".encode(errors="replace")
        self.summary(text_pb(f"{tag}/text_summary", markdown), step)

    def close(self) -> None:
        """Close the file. Every record is already written."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, event: Any) -> None:
        if self._file is None:
            self._file = self._create()
        record = _record(event)
        self._require_owned()
        append_or_undo(self._file, record)

    def _create(self) -> int:
        """Create the file with the records that must come first; return its descriptor."""
        now = time.time()
        version = Event(wall_time=now, file_version="brain.Event:2")
        start = Event(wall_time=now, step=self._first_step, session_log=SessionLog(status=SessionLog.START))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return replace_file(self._path, _record(version) + _record(start), require_owned=self._require_owned)


def _record(event: Any) -> bytes:
    buffer = io.BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
