"""Find ranks that slow down the others: each rank times its own work, all compare, and rank 0 names the slow ones.

Collectives make the steps of all ranks as long as those of the slowest. So the own work of a rank is what it does in a
step before it first waits for another rank.
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

# A rank is slow if its own work takes so many times the median of the others, and is above it by at least a floor.
SLOWER, FLOOR_SECONDS, SAVE_FLOOR_SECONDS = 1.5, 0.010, 0.5
# Ranks are compared over intervals of at least this length. A rank is reported as slow, or as no longer slow, after so
# many intervals in a row. For saves, only intervals with a save count.
INTERVAL_SECONDS, IN_A_ROW = 2.0, 3
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


@dataclass(frozen=True)
class Comparison:
    """A comparison of all ranks over some steps. Seconds are means per step."""

    messages: list[str]  # for the user: ranks that have become slow, or keep up again
    median_own_work: float
    longest_own_work: float
    longest_data_wait: float


class StragglerMonitor:
    """Collects the work of this rank and compares it with that of the others. All ranks make the same calls."""

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self._runtime = runtime
        self._timer = OwnWorkTimer(model, runtime.device)
        self._detector = StragglerDetector(hosts_of_ranks(runtime))
        self._work, self._steps = Work(), 0

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._timer.begin()

    def exclude(self, seconds: float) -> None:
        """Subtract seconds for which this rank waited for the others in the middle of a step."""
        self._timer.exclude(seconds)

    def end_step(self, *, data_wait: float, save_seconds: float, saved_bytes: float) -> None:
        """Add the step since begin_step(), with its data wait and saves. Call it after the last backward pass."""
        self._timer.end()
        self._work += Work(0.0, data_wait, save_seconds, saved_bytes)
        self._steps += 1

    def reset(self) -> None:
        """Forget the steps since the last comparison, such as the first one of an attempt, which warms up."""
        self._timer.pop_seconds()
        self._work, self._steps = Work(), 0

    def compare(self, seconds: float) -> Comparison:
        """Compare the steps since the last comparison, which took so many seconds. All ranks call it."""
        self._work += Work(own=self._timer.pop_seconds())
        rows = all_gather_row(astuple(self._work), self._runtime)
        works, steps = [Work(*row) for row in rows], self._steps
        self.reset()
        own = sorted(work.own / steps for work in works)
        return Comparison(
            self._detector.update(works, steps=steps, seconds=seconds),
            statistics.median(own),
            own[-1],
            max(work.data_wait / steps for work in works),
        )


class OwnWorkTimer:
    """Times the own work of this rank in each step.

    With whole replicas (one process, DDP), own work ends with the last gradient of the last micro-batch, that of the
    token embedding: only then does DDP wait for the others. A sharded model waits for the shards of others in every
    block, so own work ends at the first forward pass: slow data shows, a slow device does not. On CUDA, events in the
    stream time the kernels; before a sharded forward pass, the host's clock does.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        gpt = unwrap_model(model)
        sharded = isinstance(gpt, FSDPModule)
        self._stopwatch: _Stopwatch | _CudaStopwatch
        self._stopwatch = _CudaStopwatch() if device.type == "cuda" and not sharded else _Stopwatch()
        self._forward_came, self._sharded = False, sharded
        self._excluded = 0.0  # since pop_seconds
        if sharded:
            # Before FSDP's own hook, which waits.
            gpt.register_forward_pre_hook(self._at_forward, prepend=True)
        else:
            gpt.token_embedding.weight.register_post_accumulate_grad_hook(self._at_last_gradient)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Start the clock."""
        self._forward_came = False
        self._stopwatch.start()

    def end(self) -> None:
        """End the step since begin(). Does not wait for the device."""
        self._stopwatch.end()

    def pop_seconds(self) -> float:
        """Return the own work of the steps since the last call. On CUDA it waits for the last backward pass."""
        seconds, self._excluded = self._stopwatch.pop_seconds() - self._excluded, 0.0
        return seconds

    def exclude(self, seconds: float) -> None:
        """Subtract seconds for which this rank waited for the others between two micro-batches."""
        if not self._sharded:
            self._excluded += seconds

    def _at_last_gradient(self, _: torch.Tensor) -> None:
        self._stopwatch.stop()

    def _at_forward(self, *_: Any) -> None:
        if not self._forward_came:
            self._stopwatch.stop()
        self._forward_came = True


class StragglerDetector:
    """Reports ranks that are slow over several intervals, and those that no longer are."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """`hosts`: the name of the host of each rank."""
        self._hosts = hosts
        self._sums = [Work()] * len(hosts)
        self._steps, self._seconds = 0, 0.0
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
            if history.update(own[rank] >= SLOWER * median and own[rank] - median >= FLOOR_SECONDS):
                status = "is slow" if history.slow else "keeps up again"
                waited = _span(self._sums[rank].data_wait / self._steps)
                yield (
                    f"rank {rank} on {host} {status}: its own work takes {_span(own[rank])} a step, "
                    f"the others' median is {_span(median)}; data wait {waited} a step"
                )

    def _slow_to_save(self) -> Iterator[str]:
        """Compare each rank with the others' seconds and seconds per byte: shares differ, and some ranks have none."""
        shares = {rank: work for rank, work in enumerate(self._sums) if work.saved_bytes}
        if len(shares) < 2:
            return
        seconds = sorted(work.save for work in shares.values())
        per_byte = sorted(work.save / work.saved_bytes for work in shares.values())
        for rank, work in shares.items():
            at_same_speed = median_without(per_byte, work.save / work.saved_bytes) * work.saved_bytes
            usual = max(median_without(seconds, work.save), at_same_speed)
            history = self._save_histories[rank]
            if history.update(work.save >= SLOWER * usual and work.save - usual >= SAVE_FLOOR_SECONDS):
                status = "is slow to save" if history.slow else "saves as fast as the others again"
                yield (
                    f"rank {rank} on {self._hosts[rank]} {status}: {_span(work.save)} for its share of checkpoints, "
                    f"{_span(usual)} at the speed of the others"
                )


@dataclass
class _History:
    """The last reported status of a rank, and whether a new one is to be reported."""

    slow: bool = False
    disagreeing: int = 0  # intervals in a row with the opposite status
    age: int = 0  # intervals since the last report

    def update(self, slow: bool) -> bool:
        """Add another interval; tell whether the status is to be reported."""
        self.age += 1
        self.disagreeing = self.disagreeing + 1 if slow != self.slow else 0
        if self.disagreeing == IN_A_ROW:
            self.slow = slow
        elif not (self.slow and slow and self.age >= REMIND_INTERVALS):
            return False
        self.disagreeing = self.age = 0
        return True


class _Stopwatch:
    """Seconds of the host's clock from each start() to the last stop() before its end()."""

    def __init__(self) -> None:
        self._started = self._stopped = self._seconds = 0.0

    def start(self) -> None:
        self._started = self._stopped = time.perf_counter()

    def stop(self) -> None:
        self._stopped = time.perf_counter()

    def end(self) -> None:
        self._seconds += self._stopped - self._started

    def pop_seconds(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _CudaStopwatch:
    """The same in the current CUDA stream, where kernels run asynchronously. Only pop_seconds() waits for them."""

    def __init__(self) -> None:
        self._ended: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stopped = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._started.record()

    def stop(self) -> None:
        self._stopped.record()

    def end(self) -> None:
        self._ended.append((self._started, self._stopped))

    def pop_seconds(self) -> float:
        milliseconds = 0.0
        for started, stopped in self._ended:
            stopped.synchronize()
            milliseconds += float(started.elapsed_time(stopped))
        self._ended.clear()
        return milliseconds / 1e3


def median_without(ordered: Sequence[float], value: float) -> float:
    """Return the lower median of sorted numbers, without one equal to `value`; `value` itself if it is the only one."""
    if len(ordered) == 1:
        return value
    middle = (len(ordered) - 2) // 2
    return ordered[middle + (bisect.bisect_left(ordered, value) <= middle)]


def _span(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
