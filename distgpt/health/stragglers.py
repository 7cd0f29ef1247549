"""Find ranks that slow down the others: each rank times its own work, and a comparison names the slow ones.

Collectives make the steps of all ranks as long as those of the slowest. So the own work of a rank is only what it does
in a step before it first waits for another rank.
"""

import bisect
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from distgpt.distributed.collectives import all_gather_row, hosts_of_ranks
from distgpt.distributed.parallelize import unwrap_model
from distgpt.distributed.runtime import Runtime

# A rank is slow if its own work takes so many times the median of the others, and at least so many seconds more.
SLOW_FACTOR, MARGIN_SECONDS, SAVE_MARGIN_SECONDS = 1.5, 0.010, 0.5
# Ranks are compared over intervals of at least this length. A rank is reported as slow, or as no longer slow, after so
# many intervals in a row. For saves, only intervals with a save count.
INTERVAL_SECONDS, INTERVALS_IN_A_ROW = 2.0, 3
# A rank that stays slow is reported again after so many intervals.
REMIND_INTERVALS = 100


@dataclass(frozen=True)
class Work:
    """Seconds that a rank spent over some steps."""

    own: float = 0.0
    data_wait: float = 0.0  # part of its own work
    save: float = 0.0  # writing its share of checkpoints, which training does not wait for
    saved_bytes: float = 0.0  # bytes written in `save` seconds

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class StragglerMonitor:
    """Collects the work of this rank and compares it with that of the others. All ranks make the same calls."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self._runtime = runtime
        self.timer = OwnWorkTimer(model, runtime.device)
        self._detector = StragglerDetector(hosts_of_ranks(runtime))
        self.reset()

    def end_step(self, *, data_wait: float, save_seconds: float, saved_bytes: float) -> None:
        """Add the step that `timer` timed, with its data wait and saves. Call it after the last backward pass."""
        self.timer.end()
        self._work += Work(0.0, data_wait, save_seconds, saved_bytes)
        self._steps += 1

    def reset(self) -> None:
        """Forget the steps since the last comparison, for example the first one of an attempt, which warms up."""
        self.timer.pop_seconds()
        self._work, self._steps = Work(), 0

    def compare(self, seconds: float) -> tuple[list[str], dict[str, float]]:
        """Compare the steps since the last comparison, which took so many seconds. All ranks call it.

        Returns messages about ranks that have become slow or keep up again, and figures by name, in seconds a step.
        """
        self._work += Work(own=self.timer.pop_seconds())
        works, steps = [Work(*row) for row in all_gather_row(astuple(self._work), self._runtime)], self._steps
        self.reset()
        return self._detector.update(works, steps=steps, seconds=seconds), {
            "own_work_s_median": statistics.median(work.own for work in works) / steps,
            "own_work_s_longest": max(work.own for work in works) / steps,
            "data_wait_s_longest": max(work.data_wait for work in works) / steps,
        }


class OwnWorkTimer:
    """Times the own work of this rank in each step.

    With whole replicas (one process, DDP), own work ends with the last gradient of the last micro-batch, that of the
    token embedding: only then does DDP wait for the others. A sharded model waits for the shards of others in every
    block, so own work ends at the first forward pass: that shows slow data, but not a slow device. On CUDA, events in
    the stream time the kernels; before a sharded forward pass, the host's clock does.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        gpt = unwrap_model(model)
        self._sharded = isinstance(gpt, FSDPModule)
        self._times_kernels = device.type == "cuda" and not self._sharded
        self._seconds = 0.0  # since pop_seconds, less what was excluded
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # of steps since then
        self.begin()
        if self._sharded:
            # Prepended, to run before FSDP's own hook, which waits.
            gpt.register_forward_pre_hook(self._at_forward, prepend=True)
        else:
            gpt.token_embedding.weight.register_post_accumulate_grad_hook(self._at_last_gradient)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Start the clock."""
        self._started = self._stopped = self._now()
        self._forward_came = False

    def end(self) -> None:
        """End the step since begin(). Does not wait for the device."""
        if self._times_kernels:
            self._events.append((self._started, self._stopped))
        else:
            self._seconds += self._stopped - self._started

    def pop_seconds(self) -> float:
        """Return the own work of the steps since the last call. On CUDA it waits for the last backward pass."""
        for started, stopped in self._events:
            stopped.synchronize()
            self._seconds += started.elapsed_time(stopped) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds

    def exclude(self, seconds: float) -> None:
        """Subtract seconds for which this rank waited for the others between two micro-batches."""
        if not self._sharded:
            self._seconds -= seconds

    def _now(self) -> Any:
        """Return the host's time in seconds, or record an event in the stream, where kernels run asynchronously."""
        if not self._times_kernels:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _at_last_gradient(self, _: torch.Tensor) -> None:
        self._stopped = self._now()

    def _at_forward(self, *_: Any) -> None:
        if not self._forward_came:
            self._stopped = self._now()
        self._forward_came = True


class StragglerDetector:
    """Reports ranks that are slow over several intervals, and those that no longer are."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """`hosts`: the name of the host of each rank."""
        self._hosts = hosts
        self._sums, self._steps, self._seconds = [Work()] * len(hosts), 0, 0.0
        self._histories = [_History() for _ in hosts]
        self._save_histories = [_History() for _ in hosts]

    def update(self, works: Sequence[Work], *, steps: int, seconds: float) -> list[str]:
        """Add the work of each rank in some steps, which took so many seconds.

        Returns one message for each rank whose status has changed.
        """
        self._sums = [total + work for total, work in zip(self._sums, works, strict=True)]
        self._steps += steps
        self._seconds += seconds
        if self._seconds < INTERVAL_SECONDS:
            return []
        messages = [*self._slow_at_work(), *self._slow_to_save()]
        self._sums, self._steps, self._seconds = [Work()] * len(self._hosts), 0, 0.0
        return messages

    def _slow_at_work(self) -> Iterator[str]:
        own = [work.own / self._steps for work in self._sums]
        ordered = sorted(own)
        for rank, (host, history) in enumerate(zip(self._hosts, self._histories, strict=True)):
            median = median_without(ordered, own[rank])
            if history.update(own[rank] >= SLOW_FACTOR * median and own[rank] - median >= MARGIN_SECONDS):
                status = "is slow" if history.slow else "keeps up again"
                waited = _span(self._sums[rank].data_wait / self._steps)
                yield (
                    f"rank {rank} on {host} {status}: its own work takes {_span(own[rank])} a step, "
                    f"the others' median is {_span(median)}; data wait {waited} a step"
                )

    def _slow_to_save(self) -> Iterator[str]:
        """Compare each rank's seconds, and seconds per byte, with the others': shares differ, and some are empty."""
        shares = {rank: work for rank, work in enumerate(self._sums) if work.saved_bytes}
        if len(shares) < 2:
            return
        seconds = sorted(work.save for work in shares.values())
        per_byte = sorted(work.save / work.saved_bytes for work in shares.values())
        for rank, work in shares.items():
            at_same_speed = median_without(per_byte, work.save / work.saved_bytes) * work.saved_bytes
            usual = max(median_without(seconds, work.save), at_same_speed)
            history = self._save_histories[rank]
            if history.update(work.save >= SLOW_FACTOR * usual and work.save - usual >= SAVE_MARGIN_SECONDS):
                status = "is slow to save" if history.slow else "saves as fast as the others again"
                yield (
                    f"rank {rank} on {self._hosts[rank]} {status}: {_span(work.save)} for its share of checkpoints, "
                    f"{_span(usual)} at the speed of the others"
                )


@dataclass
class _History:
    """The last reported status of a rank, and whether a new one is to be reported."""

    slow: bool = False
    opposite: int = 0  # intervals in a row with the opposite status
    age: int = 0  # intervals since the last report

    def update(self, slow: bool) -> bool:
        """Add another interval; tell whether the status is to be reported."""
        self.age += 1
        self.opposite = self.opposite + 1 if slow != self.slow else 0
        if self.opposite == INTERVALS_IN_A_ROW:
            self.slow = slow
        elif not (self.slow and slow and self.age >= REMIND_INTERVALS):
            return False
        self.opposite = self.age = 0
        return True


def median_without(ordered: Sequence[float], value: float) -> float:
    """Return the lower median of sorted numbers, without one equal to `value`; `value` itself if it is the only one."""
    if len(ordered) == 1:
        return value
    middle = (len(ordered) - 2) // 2
    return ordered[middle + (bisect.bisect_left(ordered, value) <= middle)]


def _span(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
