"""The time of a run by its use, over all its attempts. Rank 0 records it in goodput.jsonl.

An attempt is one start of the training processes. Each line holds all seconds that its attempt has spent so far, so a
lost line loses nothing once the next one is written. Time within an attempt is measured with the monotonic clock. Time
between attempts needs the wall clock, which may be set back or belong to another host; a negative pause counts as 0.

The time of a killed attempt after its last line counts as recovery, and so does an attempt that never trained.
"""

import bisect
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from distgpt.files import process_age
from distgpt.telemetry.owned_files import append_or_undo, open_for_appending

Part = Literal["start", "steps", "data_wait", "checkpoint", "evaluation", "other"]
End = Literal["done", "interrupted", "failed"]
PARTS: tuple[Part, ...] = get_args(Part)

# A line is due after this many seconds, or after this share of the attempt if that is less. A kill loses at most that.
LINE_SECONDS, LINE_SHARE = 10.0, 0.01


@dataclass(frozen=True)
class Line:
    """One line of goodput.jsonl: the seconds that an attempt has spent so far, by part."""

    attempt: int
    at: float  # wall clock, seconds since 1970
    step: int  # the last finished step; in an attempt's first line the step of the checkpoint that it resumes
    start: float = 0.0  # from the start of the process to the end of its first step, which compiles and warms up
    steps: float = 0.0
    data_wait: float = 0.0  # of rank 0; the other ranks' data wait is part of `steps`, since rank 0 waits for them
    checkpoint: float = 0.0  # while training waited for a save
    evaluation: float = 0.0
    other: float = 0.0
    end: End | None = None

    @property
    def spent(self) -> float:
        """The seconds of the attempt so far."""
        return float(sum(getattr(self, part) for part in PARTS))


@dataclass(frozen=True)
class TimeSpent:
    """The seconds of a run by part: the parts of a Line, `repeated` and `recovery`.

    `repeated`: steps that were lost and done again. `recovery`: from an attempt's last line to the next attempt.
    """

    seconds: Mapping[str, float]
    attempts: int
    failures: int  # attempts before the last one that ended neither in "done" nor "interrupted"

    @property
    def total(self) -> float:
        """The seconds of all parts."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time, 0 to 1, spent in steps that were not lost and done again."""
        return self.seconds["steps"] / self.total if self.total else 0.0


def time_spent(lines: Sequence[Line]) -> TimeSpent:
    """Add up the lines of a run. The time between "done" and a later attempt to train more steps does not count."""
    attempts = attempts_of(lines)
    seconds: dict[str, float] = {part: sum(getattr(attempt[-1], part) for attempt in attempts) for part in PARTS}
    seconds["repeated"] = _repeated_seconds(attempts)
    seconds["steps"] -= seconds["repeated"]
    seconds["recovery"] = sum(seconds_between(a[-1], b[0]) for a, b in itertools.pairwise(attempts))
    failures = sum(attempt[-1].end not in ("done", "interrupted") for attempt in attempts[:-1])
    return TimeSpent(seconds, len(attempts), failures)


def attempts_of(lines: Sequence[Line]) -> list[list[Line]]:
    """Return the lines of each attempt, in order. There is no empty attempt."""
    # Sorted, since a process that hung and was replaced may have written one more line later.
    by_attempt = itertools.groupby(sorted(lines, key=lambda line: line.attempt), key=lambda line: line.attempt)
    return [list(group) for _, group in by_attempt]


def read_goodput(path: Path) -> list[Line]:
    """Return the lines of a goodput.jsonl, none if there is no file. Incomplete and foreign lines are left out."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    return [line for text in content.splitlines() if (line := _parse_line(text)) is not None]


class Goodput:
    """The time of the current attempt, which began with this process, added to that of the attempts before it."""

    def __init__(self, path: Path | None, *, start_step: int, require_owned: Callable[[], object]) -> None:
        """Read the earlier attempts from `path`. With None, as on other ranks, nothing is read or written."""
        self._path, self._require_owned = path, require_owned
        self._file: int | None = None
        age = process_age()
        earlier = read_goodput(path) if path else []
        attempt = 1 + max((line.attempt for line in earlier), default=0)
        self._first_line = Line(attempt, at=time.time() - age, step=start_step)
        self._earlier = time_spent([*earlier, self._first_line])
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._step = start_step
        self._began = self._last_call = self._due_at = time.monotonic() - age
        self._wrote_first_line = False
        self.charge("start")

    def charge(self, part: Part) -> float:
        """Attribute the time since the last call, or since the process began, to `part`; return its seconds."""
        now = time.monotonic()
        seconds, self._last_call = now - self._last_call, now
        self._spent[part] += seconds
        return seconds

    def step(self, step: int, *, data_wait: float) -> float:
        """Attribute the time since the last call to a finished step and its data wait; return its seconds."""
        is_first = self._step == self._first_line.step
        self._step = step
        seconds = self.charge("start" if is_first else "steps")
        if not is_first:
            waited = min(data_wait, seconds)
            self._spent["steps"] -= waited
            self._spent["data_wait"] += waited
        return seconds

    def so_far(self) -> TimeSpent:
        """Return the time of the whole run up to the last call of `charge` or `step`."""
        return replace(
            self._earlier, seconds={part: t + self._spent.get(part, 0.0) for part, t in self._earlier.seconds.items()}
        )

    def write(self, *, end: End | None = None) -> None:
        """Append a line if one is due; the first and the last line always are.

        Raises OSError if that fails; the file then holds no part of the line.
        """
        now = time.monotonic()
        if self._path is None or (end is None and now < self._due_at):
            return
        self._due_at = now + min(LINE_SECONDS, LINE_SHARE * (now - self._began))
        if self._file is None:
            self._file = _open(self._path, self._require_owned)
        spent = {part: round(seconds, 3) for part, seconds in self._spent.items()}
        line = Line(self._first_line.attempt, time.time(), self._step, end=end, **spent)
        lines = [line] if self._wrote_first_line else [self._first_line, line]
        self._require_owned()
        append_or_undo(self._file, "".join(f"{json.dumps(asdict(line))}\n" for line in lines).encode())
        self._wrote_first_line = True

    def close(self) -> None:
        """Close the file. Every line is already written."""
        if self._file is not None:
            os.close(self._file)


def _open(path: Path, require_owned: Callable[[], object]) -> int:
    """Open a goodput.jsonl for appending. If an earlier attempt left an incomplete last line, end that line."""
    file = open_for_appending(path, require_owned=require_owned)
    if (size := os.fstat(file).st_size) and os.pread(file, 1, size - 1) != b"\n":
        append_or_undo(file, b"\n")
    return file


def _repeated_seconds(attempts: Iterable[Sequence[Line]]) -> float:
    """Return the seconds of lost steps: those after the checkpoint that a later attempt resumed.

    Between two lines the steps are taken as equally long.
    """
    # A curve: up to step steps[i], the steps that are not lost took seconds[i] in total.
    steps, seconds = [0], [0.0]
    repeated = 0.0
    for attempt in attempts:
        before = 0.0
        for line in attempt:
            if line.step < steps[-1]:
                kept = float(np.interp(line.step, steps, seconds))
                repeated += seconds[-1] - kept
                count = bisect.bisect_left(steps, line.step)
                steps, seconds = [*steps[:count], line.step], [*seconds[:count], kept]
            steps.append(line.step)
            seconds.append(seconds[-1] + line.steps - before)
            before = line.steps
    return repeated


def seconds_between(last: Line, first: Line) -> float:
    """Return the seconds from the last line of an attempt to the start of the next attempt."""
    return 0.0 if last.end == "done" else max(0.0, first.at - first.spent - last.at)


def _parse_line(text: bytes) -> Line | None:
    try:
        line = Line(**json.loads(text))
        return line if math.isfinite(line.attempt + line.at + line.step + line.spent) else None
    except (ValueError, TypeError):
        return None
