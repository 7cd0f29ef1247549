"""The bandwidth between ranks: of an all-reduce, and of every link of the ring in both directions.

All links of one direction are measured at the same time, so that the time does not grow with the number of ranks. On
each link the receiver measures the time. The amount of data grows until the slowest link takes MIN_TRANSFER_SECONDS.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distgpt.distributed.collectives import all_gather_row
from distgpt.distributed.runtime import Runtime
from distgpt.preflight.finding import Finding, ok, warning

MIN_TRANSFER_BYTES, MAX_TRANSFER_BYTES = 2**18, 2**26
MIN_TRANSFER_SECONDS = 0.1
REPEATS = 3
# A link is slow below this share of the median. Links within one host are compared with each other only.
SLOW_SHARE = 0.5


@dataclass(frozen=True)
class Link:
    """One direction between two ranks that are neighbours in the ring."""

    source: int
    destination: int
    bytes_per_second: float


def measure(runtime: Runtime) -> tuple[Finding, list[Link]]:
    """Measure the all-reduce and all links. Collective: all ranks call it, and all get the whole result."""
    if not runtime.distributed:
        return ok("links", "one rank, no link to measure"), []
    shifts = sorted({1, runtime.world_size - 1})
    rates = all_gather_row([_measure_link(runtime, shift) for shift in shifts], runtime)
    return _measure_all_reduce(runtime), [
        Link((rank - shift) % runtime.world_size, rank, rate)
        for rank, row in enumerate(rates)
        for shift, rate in zip(shifts, row, strict=True)
    ]


def check_links(links: Sequence[Link], *, host_of: Sequence[int], names: Sequence[str]) -> list[Finding]:
    """Return a finding for the links between hosts and one for those within a host, if there are such links.

    `host_of`: the number of each rank's host, by rank. `names`: the names of the hosts, by number.
    """
    host_names = [names[host] for host in host_of]
    rank_names = [f"{name} rank {rank}" for rank, name in enumerate(host_names)]
    between = [link for link in links if host_of[link.source] != host_of[link.destination]]
    within = [link for link in links if host_of[link.source] == host_of[link.destination]]
    findings = [_compare_links("links", between, host_names, host_names)] if between else []
    return findings + ([_compare_links("inside a host", within, rank_names, host_names)] if within else [])


def _compare_links(check: str, links: Sequence[Link], labels: Sequence[str], host_names: Sequence[str]) -> Finding:
    """Compare links with each other. `labels`, `host_names`: the names to show of each rank and of its host."""
    median = statistics.median(link.bytes_per_second for link in links)
    by_speed = sorted(links, key=lambda link: link.bytes_per_second)
    described = [
        f"{labels[link.source]} -> {labels[link.destination]} {_rate(link.bytes_per_second)}" for link in by_speed
    ]
    slow = [link for link in by_speed if link.bytes_per_second < SLOW_SHARE * median]
    if not slow:
        return ok(check, f"median {_rate(median)}; slowest {described[0]}")
    common_hosts = set.intersection(*({host_names[link.source], host_names[link.destination]} for link in slow))
    slow_host = f"{common_hosts.pop()} is slow: " if len(slow) > 1 and len(common_hosts) == 1 else "slow: "
    return warning(
        check,
        f"{slow_host}{', '.join(described[: min(4, len(slow))])} (median {_rate(median)}): all ranks wait for the "
        "slowest link; check its cable, port and driver, or leave that host out",
    )


def _rate(bytes_per_second: float) -> str:
    mega = bytes_per_second / 1e6
    return f"{mega / 1000:.1f} GB/s" if mega >= 1000 else f"{mega:.1f} MB/s"


def _measure_link(runtime: Runtime, shift: int) -> float:
    """Return the bytes per second received from the rank that is `shift` places before this one."""
    size = runtime.world_size
    destination, source = (runtime.rank + shift) % size, (runtime.rank - shift) % size

    def exchange(payload: Tensor) -> list[dist.Work]:
        receive = dist.P2POp(dist.irecv, torch.empty_like(payload), source)
        receiving, *sending = dist.batch_isend_irecv([receive, dist.P2POp(dist.isend, payload, destination)])
        receiving.wait()
        return sending

    amount, seconds = _time_transfer(runtime, exchange)
    return amount / seconds


def _measure_all_reduce(runtime: Runtime) -> Finding:
    def all_reduce(payload: Tensor) -> list[dist.Work]:
        dist.all_reduce(payload)
        return []

    amount, seconds = _time_transfer(runtime, all_reduce)
    slowest = _max_over_ranks(seconds, runtime)
    # A ring all-reduce sends 2 (n - 1) / n of the tensor over each link.
    rate = 2 * (runtime.world_size - 1) / runtime.world_size * amount / slowest
    size = f"{amount / 2**20:.2g} MiB over {runtime.world_size} ranks"
    return ok("all-reduce", f"{size} in {slowest * 1000:.1f} ms, {_rate(rate)} per rank")


def _time_transfer(runtime: Runtime, transfer: Callable[[Tensor], list[dist.Work]]) -> tuple[int, float]:
    """Time growing transfers; return the size of the last one in bytes and this rank's shortest time in seconds.

    `transfer` returns the work that is still pending when the time is taken.
    """
    amount = MIN_TRANSFER_BYTES
    while True:
        payload = torch.zeros(amount // 4, device=runtime.device)
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            started = time.perf_counter()
            pending = transfer(payload)
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            for work in pending:
                work.wait()
        if amount >= MAX_TRANSFER_BYTES or _max_over_ranks(min(times), runtime) > MIN_TRANSFER_SECONDS:
            return amount, min(times)
        amount *= 4


def _max_over_ranks(seconds: float, runtime: Runtime) -> float:
    """Return the longest time of all ranks, so that all of them go on or stop together."""
    return max(row[0] for row in all_gather_row([seconds], runtime))
