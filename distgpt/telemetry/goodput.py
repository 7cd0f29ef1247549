"""Where the time of a run went, over all its attempts: goodput.jsonl in the run directory, written by rank 0.

Each line tells what the attempt that wrote it has spent so far, so a line that is lost loses nothing once the next one
is written. Seconds within an attempt are the monotonic clock's and add up to its length; between attempts there is only
the wall clock, which may have been set back or be another host's, so a pause is never less than nothing.

What a killed attempt did after its last line counts as recovery, as does an attempt that never came to train.
"""

import bisect
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from distgpt.files import process_age
from distgpt.telemetry.tensorboard import append_whole, put_anew

Part = Literal["start", "steps", "data_wait", "checkpoint", "evaluation", "other"]
End = Literal["done", "interrupted", "failed"]
PARTS: tuple[Part, ...] = get_args(Part)

# A line once this many seconds have passed since the last one, or this share of the attempt: a kill loses no more.
LINE_SECONDS, LINE_SHARE = 10.0, 0.01


@dataclass(frozen=True)
class Line:
    """A line of goodput.jsonl: the seconds that an attempt has spent so far, by part."""

    attempt: int
    at: float  # wall clock, seconds since 1970
    step: int  # the last one finished, or in an attempt's first line the one that it goes on from
    start: float = 0.0  # from the start of the process to the end of its first step, which compiles and warms up
    steps: float = 0.0
    data_wait: float = 0.0  # rank 0's; that of other ranks shows in the steps, as they wait for each other
    checkpoint: float = 0.0  # training stood still for it
    evaluation: float = 0.0
    other: float = 0.0
    end: End | None = None

    @property
    def spent(self) -> float:
        """The length of the attempt so far."""
        return float(sum(getattr(self, part) for part in PARTS))


@dataclass(frozen=True)
class Account:
    """The seconds of a run by part: those of a Line; `repeated`, steps that had to be done again; `recovery`."""

    seconds: Mapping[str, float]
    attempts: int
    failures: int  # attempts before the last one that were neither done nor interrupted on request

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time, 0 to 1, that went into steps that were not done again later."""
        return self.seconds["steps"] / self.total if self.total else 0.0


def account_of(lines: Sequence[Line]) -> Account:
    """What the lines of a ledger add up to. The time between "done" and an attempt to go further is not the run's."""
    # Sorted: a process that was given up for dead may have written once more.
    by_attempt = itertools.groupby(sorted(lines, key=lambda line: line.attempt), key=lambda line: line.attempt)
    attempts = [list(group) for _, group in by_attempt]
    seconds: dict[str, float] = {part: sum(getattr(attempt[-1], part) for attempt in attempts) for part in PARTS}
    seconds["repeated"] = _repeated(attempts)
    seconds["steps"] -= seconds["repeated"]
    seconds["recovery"] = sum(_pause(a[-1], b[0]) for a, b in itertools.pairwise(attempts))
    failures = sum(attempt[-1].end not in ("done", "interrupted") for attempt in attempts[:-1])
    return Account(seconds, len(attempts), failures)


def read_ledger(path: Path) -> list[Line]:
    """The whole lines of a ledger, none where there is no file; a line that is torn or not ours is left out."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    return [line for text in content.splitlines() if (line := _parsed(text)) is not None]


class Ledger:
    """The account of the attempt under way, which began with this process, on top of those before it."""

    def __init__(self, path: Path | None, *, start_step: int, require_owned: Callable[[], object]) -> None:
        """`path` is rank 0's; without it nothing is read or written. `require_owned` is called before each write."""
        self._path = path
        self._require_owned = require_owned
        age = process_age()
        earlier = read_ledger(path) if path else []
        attempt = 1 + max((line.attempt for line in earlier), default=0)
        self._opening = Line(attempt, at=time.time() - age, step=start_step)
        self._before = account_of([*earlier, self._opening])
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._step = start_step
        self._began = self._marked = time.monotonic() - age
        self._due = self._began
        self._opened = False
        self.spend("start")

    def spend(self, part: Part) -> float:
        """All time since the last call, or since the process began, went into `part`; its seconds."""
        now = time.monotonic()
        seconds, self._marked = now - self._marked, now
        self._spent[part] += seconds
        return seconds

    def step(self, step: int, *, data_wait: float) -> float:
        """The time since the last call went into a step that is now finished, or into waiting for data; its seconds."""
        first, self._step = self._step == self._opening.step, step
        seconds = self.spend("start" if first else "steps")
        if not first:
            moved = min(data_wait, seconds)
            self._spent["steps"] -= moved
            self._spent["data_wait"] += moved
        return seconds

    def account(self) -> Account:
        """The account of the whole run up to the last call of spend or step."""
        seconds = {part: before + self._spent.get(part, 0.0) for part, before in self._before.seconds.items()}
        return Account(seconds, self._before.attempts, self._before.failures)

    def write(self, *, end: End | None = None) -> None:
        """Append a line if one is due, as the first and the last one are. Raises OSError and leaves the file whole."""
        now = time.monotonic()
        if self._path is None or (end is None and now < self._due):
            return
        self._due = now + min(LINE_SECONDS, LINE_SHARE * (now - self._began))
        spent = {part: round(seconds, 3) for part, seconds in self._spent.items()}
        line = Line(self._opening.attempt, time.time(), self._step, end=end, **spent)
        lines = [line] if self._opened else [self._opening, line]
        text = "".join(f"{json.dumps(asdict(line))}\n" for line in lines)
        if not self._opened and self._path.exists():
            put_anew(self._path, require_owned=self._require_owned)
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            # After it was opened: from here on the next owner puts another file in its place.
            self._require_owned()
            append_whole(file, (_missing_newline(file) + text).encode())
        finally:
            os.close(file)
        self._opened = True


def _repeated(attempts: Iterable[Sequence[Line]]) -> float:
    """Seconds of steps after one that the run later went on from; between two lines, in proportion."""
    # What the steps that still count took, by the last of them.
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


def _pause(last: Line, first: Line) -> float:
    """Seconds from the last sign of an attempt to the start of the next."""
    return 0.0 if last.end == "done" else max(0.0, first.at - first.spent - last.at)


def _parsed(text: bytes) -> Line | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(Line)}:
        return None
    numbers = all(isinstance(value, int | float) for name, value in values.items() if name != "end")
    return Line(**values) if numbers else None


def _missing_newline(file: int) -> str:
    """What ends a line that was torn, so that the next one is whole."""
    size = os.fstat(file).st_size
    return "\n" if size and os.pread(file, 1, size - 1) != b"\n" else ""
