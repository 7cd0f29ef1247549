"""Which rank holds the others up: each times its own work, all tell each other, rank 0 names the slow.

Collectives make every rank's step as long as the slowest one's. So a rank's own work is what it does in a step before
it waits for another rank the first time.
"""

import bisect
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from distgpt.distributed.parallelize import unwrap_model

# What a rank is judged by: its own work is so much longer than that of the others' median, and no less than the floor.
SLOWER, FLOOR_SECONDS, SAVE_FLOOR_SECONDS = 1.5, 0.010, 0.5
# Steps are judged together until they took this long; so many judgements in a row name a rank, or clear it. Of saves
# only those intervals count that have some.
INTERVAL_SECONDS, IN_A_ROW = 2.0, 3
# A rank that stays slow is named again after so many intervals.
REMIND_INTERVALS = 100


@dataclass(frozen=True)
class Work:
    """The seconds that a rank spent on these over some steps."""

    own: float = 0.0
    data_wait: float = 0.0  # part of its own work
    save: float = 0.0  # writing its share of checkpoints, which training does not wait for
    saved_bytes: float = 0.0  # that many bytes

    def __add__(self, more: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(more), strict=True)))


class OwnWork:
    """Times this rank's own work in each step.

    With whole replicas (one process, DDP) it ends where backward comes to the token embedding, its last gradient, in
    the last micro-batch: only then does DDP wait for the others. A sharded model waits for the others' shards in every
    block, so there it ends at the first forward: a slow source of data shows, a slow device does not. On CUDA, kernels
    are what is timed, between events in their stream; before a sharded forward, the host is.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        gpt = unwrap_model(model)
        sharded = isinstance(gpt, FSDPModule)
        self._stopwatch: _Stopwatch | _CudaStopwatch
        self._stopwatch = _CudaStopwatch() if device.type == "cuda" and not sharded else _Stopwatch()
        self._forward_came, self._sharded = False, sharded
        self._left_out = 0.0
        if sharded:
            # Before FSDP's own hook, which waits.
            gpt.register_forward_pre_hook(self._at_forward, prepend=True)
        else:
            gpt.token_embedding.weight.register_post_accumulate_grad_hook(self._at_last_gradient)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A step's work begins here."""
        self._forward_came, self._left_out = False, 0.0
        self._stopwatch.start()

    def seconds(self) -> float:
        """That of the step since begin(), once the ranks have met in it."""
        return self._stopwatch.seconds() - self._left_out

    def leave_out(self, seconds: float) -> None:
        """Take off what this rank waited for the others between two micro-batches."""
        if not self._sharded:
            self._left_out += seconds

    def _at_last_gradient(self, _: torch.Tensor) -> None:
        self._stopwatch.stop()

    def _at_forward(self, *_: Any) -> None:
        if not self._forward_came:
            self._stopwatch.stop()
        self._forward_came = True


class Watch:
    """Names ranks that are slow, interval after interval, and says when they no longer are."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """`hosts`: of each rank."""
        self._hosts = hosts
        self._sums = [Work()] * len(hosts)
        self._steps, self._seconds = 0, 0.0
        self._histories = [_History() for _ in hosts]
        self._save_histories = [_History() for _ in hosts]

    def add(self, works: Sequence[Work], *, steps: int, seconds: float) -> list[str]:
        """What each rank did in these steps, which took so long; a line for each rank that there is news of."""
        self._sums = [total + work for total, work in zip(self._sums, works, strict=True)]
        self._steps += steps
        self._seconds += seconds
        if self._seconds < INTERVAL_SECONDS:
            return []
        news = self._judged()
        self._sums, self._steps, self._seconds = [Work()] * len(self._hosts), 0, 0.0
        return news

    def _judged(self) -> list[str]:
        return [*self._slow_at_work(), *self._slow_to_save()]

    def _slow_at_work(self) -> Iterator[str]:
        own = [work.own / self._steps for work in self._sums]
        ordered = sorted(own)
        for rank, (host, history) in enumerate(zip(self._hosts, self._histories, strict=True)):
            median = median_without(ordered, own[rank])
            if history.is_news(own[rank] >= SLOWER * median and own[rank] - median >= FLOOR_SECONDS):
                verdict = "is slow" if history.named else "keeps up again"
                waited = _span(self._sums[rank].data_wait / self._steps)
                yield (
                    f"rank {rank} on {host} {verdict}: {_span(own[rank])} a step of its own work, "
                    f"the others' median {_span(median)}; data wait {waited} a step"
                )

    def _slow_to_save(self) -> Iterator[str]:
        """Against the others' seconds, and theirs by the byte: shares differ, and some ranks have none."""
        shares = {rank: work for rank, work in enumerate(self._sums) if work.saved_bytes}
        if len(shares) < 2:
            return
        seconds = sorted(work.save for work in shares.values())
        by_byte = sorted(work.save / work.saved_bytes for work in shares.values())
        for rank, work in shares.items():
            like_others = median_without(by_byte, work.save / work.saved_bytes) * work.saved_bytes
            usual = max(median_without(seconds, work.save), like_others)
            history = self._save_histories[rank]
            if history.is_news(work.save >= SLOWER * usual and work.save - usual >= SAVE_FLOOR_SECONDS):
                verdict = "is slow to save" if history.named else "saves as fast again"
                yield (
                    f"rank {rank} on {self._hosts[rank]} {verdict}: {_span(work.save)} for its share of checkpoints, "
                    f"{_span(usual)} as the others write"
                )


@dataclass
class _History:
    """What was said of a rank."""

    named: bool = False
    contrary: int = 0  # intervals in a row that say otherwise
    told: int = 0  # intervals ago

    def is_news(self, slow: bool) -> bool:
        """Whether there is something to say after another interval."""
        self.told += 1
        self.contrary = self.contrary + 1 if slow != self.named else 0
        if self.contrary == IN_A_ROW:
            self.named = slow
        elif not (self.named and slow and self.told >= REMIND_INTERVALS):
            return False
        self.contrary = self.told = 0
        return True


class _Stopwatch:
    """Seconds of the host's clock from start() to the last stop()."""

    def __init__(self) -> None:
        self._started = self._stopped = 0.0

    def start(self) -> None:
        self._started = self._stopped = time.perf_counter()

    def stop(self) -> None:
        self._stopped = time.perf_counter()

    def seconds(self) -> float:
        return self._stopped - self._started


class _CudaStopwatch:
    """The same in the current stream, where kernels run later than Python asks for them."""

    def __init__(self) -> None:
        self._started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stopped = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        self._started.record()

    def stop(self) -> None:
        self._stopped.record()

    def seconds(self) -> float:
        self._stopped.synchronize()
        return float(self._started.elapsed_time(self._stopped)) / 1e3


def median_without(ordered: Sequence[float], value: float) -> float:
    """The lower median of sorted numbers less one of this value; the value itself where there is no other."""
    if len(ordered) == 1:
        return value
    middle = (len(ordered) - 2) // 2
    return ordered[middle + (bisect.bisect_left(ordered, value) <= middle)]


def _span(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
