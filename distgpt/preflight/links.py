"""How fast the ranks reach each other: an all-reduce of all, and every link of the ring in both directions.

All links of a direction are measured at once, so that the time does not grow with the number of ranks; each is timed
by its receiver. Amounts grow until the slowest link takes a good part of a second, and no further.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distgpt.distributed.collectives import all_gather_json
from distgpt.distributed.runtime import Runtime
from distgpt.preflight.finding import Finding, found, warning

FIRST_BYTES, LAST_BYTES = 2**18, 2**26
ENOUGH_SECONDS = 0.1
REPEATS = 3
ROUND_TRIPS = 10
# Against the median of its kind. Ranks of one host differ more by chance than a network's links may.
SLOW_SHARE = 0.5
LATE_FACTOR, LATE_SECONDS = 4.0, 0.001


@dataclass(frozen=True)
class Link:
    """One direction between two ranks that are neighbours in the ring. `latency` in seconds, one way."""

    source: int
    destination: int
    bytes_per_second: float
    latency: float


def measure(runtime: Runtime) -> tuple[Finding, list[Link]]:
    """The all-reduce in words, and on every rank all links. All ranks call it."""
    shifts = sorted({1, runtime.world_size - 1})
    latencies = _latencies(runtime)
    mine = []
    for shift in shifts:
        source = (runtime.rank - shift) % runtime.world_size
        rate = _bandwidth(runtime, shift)
        near = source if shift == 1 else runtime.rank
        mine.append(Link(source, runtime.rank, rate, latencies[near]))
    everyone = all_gather_json([dataclasses.astuple(link) for link in mine])
    return _all_reduce(runtime), [Link(*link) for links in everyone for link in links]


def judge(links: Sequence[Link], *, host_of: Sequence[int], names: Mapping[int, str]) -> list[Finding]:
    """A finding for the links between hosts and one for those inside of them. `host_of`: by rank; `names`: by host."""
    between = [link for link in links if host_of[link.source] != host_of[link.destination]]
    inside = [link for link in links if host_of[link.source] == host_of[link.destination]]
    across = {rank: names[host] for rank, host in enumerate(host_of)}
    within = {rank: f"{names[host]} rank {rank}" for rank, host in enumerate(host_of)}
    findings = []
    if between:
        findings.append(_judge("links", between, across, host_of, names))
    if inside:
        findings.append(_judge("inside a host", inside, within, host_of, names))
    return findings


def _judge(
    check: str,
    links: Sequence[Link],
    label: Mapping[int, str],
    host_of: Sequence[int],
    names: Mapping[int, str],
) -> Finding:
    rate = statistics.median(link.bytes_per_second for link in links)
    delay = statistics.median(link.latency for link in links)
    worst = min(links, key=lambda link: link.bytes_per_second)
    slow = [link for link in links if link.bytes_per_second < SLOW_SHARE * rate]
    late = [link for link in links if link.latency > max(LATE_FACTOR * delay, LATE_SECONDS)]
    summary = f"median {_rate(rate)} and {_delay(delay)}"
    if not slow and not late:
        return found(check, f"{summary}; slowest {_told(worst, label)}")
    odd = sorted({*slow, *late}, key=lambda link: (link.bytes_per_second, -link.latency))
    hosts = set.intersection(*({host_of[link.source], host_of[link.destination]} for link in odd))
    slow_host = f"{names[hosts.pop()]} is slow: " if len(odd) > 1 and len(hosts) == 1 else "slow: "
    return warning(
        check,
        f"{slow_host}{', '.join(_told(link, label) for link in odd[:4])} ({summary}): the slowest link sets the pace "
        "of all; look at its cable, port and driver, or leave that host out",
    )


def _told(link: Link, label: Mapping[int, str]) -> str:
    return f"{label[link.source]} -> {label[link.destination]} {_rate(link.bytes_per_second)} {_delay(link.latency)}"


def _rate(bytes_per_second: float) -> str:
    mega = bytes_per_second / 1e6
    return f"{mega / 1000:.1f} GB/s" if mega >= 1000 else f"{mega:.1f} MB/s"


def _delay(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds >= 0.001 else f"{seconds * 1e6:.0f} us"


def _latencies(runtime: Runtime) -> dict[int, float]:
    """Half of the shortest round trip between ranks i and i + 1, by i, for all i, on every rank."""
    size, rank = runtime.world_size, runtime.rank
    message = torch.zeros(1)
    shortest = torch.full((size,), float("inf"), dtype=torch.float64)
    # Neighbouring links take turns, and in an odd ring the last one is a third kind.
    for turn in range(3):
        dist.barrier()
        for first in range(size):
            if (2 if first == size - 1 and size % 2 else first % 2) != turn or (size == 2 and first == 1):
                continue
            second = (first + 1) % size
            for _ in range(ROUND_TRIPS if rank in (first, second) else 0):
                started = time.perf_counter()
                if rank == first:
                    dist.send(message, second)
                    dist.recv(message, second)
                    shortest[first] = min(shortest[first].item(), (time.perf_counter() - started) / 2)
                else:
                    dist.recv(message, first)
                    dist.send(message, first)
    dist.all_reduce(shortest, op=dist.ReduceOp.MIN)
    if size == 2:
        shortest[1] = shortest[0]
    return dict(enumerate(shortest.tolist()))


def _bandwidth(runtime: Runtime, shift: int) -> float:
    """Bytes per second from the rank that is `shift` before this one, the best of a few."""
    size = runtime.world_size
    to, source = (runtime.rank + shift) % size, (runtime.rank - shift) % size

    def exchange(sent: Tensor) -> float:
        received = torch.empty_like(sent)
        dist.barrier()
        started = time.perf_counter()
        receiving, *sending = dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, received, source), dist.P2POp(dist.isend, sent, to)]
        )
        receiving.wait()
        _synchronize(runtime)
        seconds = time.perf_counter() - started
        for work in sending:
            work.wait()
        return seconds

    amount = FIRST_BYTES
    while True:
        payload = _payload(amount, runtime)
        seconds = min(exchange(payload) for _ in range(REPEATS))
        if amount >= LAST_BYTES or _slowest(seconds) > ENOUGH_SECONDS:
            return amount / seconds
        amount *= 4


def _all_reduce(runtime: Runtime) -> Finding:
    amount = FIRST_BYTES
    while True:
        payload = _payload(amount, runtime)
        seconds = []
        for _ in range(REPEATS):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(payload)
            _synchronize(runtime)
            seconds.append(time.perf_counter() - started)
        slowest = _slowest(min(seconds))
        if amount >= LAST_BYTES or slowest > ENOUGH_SECONDS:
            break
        amount *= 4
    # A ring sends 2 (n - 1) / n of the tensor over each link.
    rate = 2 * (runtime.world_size - 1) / runtime.world_size * amount / slowest
    text = f"{amount / 2**20:.2g} MiB over {runtime.world_size} ranks in {_delay(slowest)}, {_rate(rate)} a rank"
    return found("all-reduce", text)


def _payload(amount: int, runtime: Runtime) -> Tensor:
    return torch.zeros(amount // 4, device=runtime.device)


def _synchronize(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def _slowest(seconds: float) -> float:
    """The longest of all ranks, so that all go on or stop together."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()
