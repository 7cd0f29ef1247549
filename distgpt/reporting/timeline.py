"""The time of a run in order: stretches by part, and what interrupted it.

The clock of a timeline runs while the run does, from its first start. It stands still between "done" and a later
attempt to train more steps. Its parts are those of `goodput.TimeSpent`, which has their sums.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distgpt.reporting.record import Exit, State
from distgpt.telemetry.goodput import PARTS, Line, attempts_of, seconds_between

# goodput.jsonl has a line for every few seconds, which a timeline joins to about this many stretches at most.
MAX_STRETCHES = 250
# Clocks of hosts may differ, and a report may be written a little before the line that it follows.
CLOCK_SECONDS = 5.0
UNKNOWN = "no report of its end: killed, or its host was lost"


@dataclass(frozen=True)
class Stretch:
    """Some of the time of a timeline, spent on one part."""

    part: str
    begin: float  # seconds of the timeline
    seconds: float
    first_step: int
    last_step: int


@dataclass(frozen=True)
class Interruption:
    """The end of an attempt that left the run unfinished, or after which the run was trained further."""

    begin: float  # seconds of the timeline
    at: float  # wall clock
    step: int
    state: State
    causes: tuple[str, ...]  # the first is that of the attempt, the others are those of later starts that failed
    lost_steps: int | None  # None if there was no later attempt
    pause: float  # seconds up to the next attempt


def timeline(lines: Sequence[Line], exits: Sequence[Exit], state: State) -> tuple[list[Stretch], list[Interruption]]:
    """Return the stretches and the interruptions of a run. `state`: how the run ended, or that it has not."""
    attempts = attempts_of(lines)
    shortest = sum(attempt[-1].spent for attempt in attempts) / MAX_STRETCHES
    stretches: list[Stretch] = []
    interruptions: list[Interruption] = []
    now = 0.0
    for number, attempt in enumerate(attempts):
        last, later = attempt[-1], attempts[number + 1 :]
        resumed = min((other[0].step for other in later), default=None)
        for before, after in _pairs(attempt, shortest):
            for part, seconds in _parts(before, after, resumed):
                stretches.append(Stretch(part, now, seconds, before.step, after.step))
                now += seconds
        pause = seconds_between(last, later[0][0]) if later else 0.0
        if later or state not in ("done", "running"):
            until = later[0][0].at if later else float("inf")
            reports = [report for report in exits if attempt[0].at <= report.at + CLOCK_SECONDS and report.at < until]
            interruptions.append(_interruption(last, reports, begin=now, pause=pause, resumed=resumed))
        if pause:
            stretches.append(Stretch("recovery", now, pause, last.step, last.step))
            now += pause
    return stretches, interruptions


def _interruption(
    last: Line, reports: Sequence[Exit], *, begin: float, pause: float, resumed: int | None
) -> Interruption:
    """Describe the end of an attempt by its last line and the reports that were written until the next attempt."""
    killed: State = last.end or "killed"
    state = reports[0].state if reports else killed
    causes = tuple(report.cause for report in reports) or (last.end or UNKNOWN,)
    lost = None if resumed is None else max(0, last.step - resumed)
    return Interruption(begin, last.at, last.step, state, causes, lost, pause)


def _pairs(attempt: Sequence[Line], shortest: float) -> Iterable[tuple[Line, Line]]:
    """Yield lines before and after each stretch of at least `shortest` seconds; the last one may be shorter."""
    before = attempt[0]
    for line in attempt[1:]:
        if line.spent - before.spent >= shortest or line is attempt[-1]:
            yield before, line
            before = line


def _parts(before: Line, after: Line, resumed: int | None) -> Iterable[tuple[str, float]]:
    """Yield the parts of the time between two lines, and their seconds. Steps after `resumed` were done again."""
    for part in PARTS:
        seconds = getattr(after, part) - getattr(before, part)
        if seconds <= 0:
            continue
        kept = 1.0
        if part == "steps" and resumed is not None and after.step > before.step:
            kept = min(1.0, max(0.0, (resumed - before.step) / (after.step - before.step)))
        if kept:
            yield part, seconds * kept
        if kept < 1:
            yield "repeated", seconds * (1 - kept)
