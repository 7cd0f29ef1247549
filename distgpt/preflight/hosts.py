"""Checks of all hosts of a job: same code, config and data, equal clocks, one run directory, open connections.

The checks run in three stages. The first two use only torchrun's store, which every host can reach, and name each host
that cannot reach another one. The third stage creates the process group, which would only report a timeout.
"""

import dataclasses
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distgpt.config import Config
from distgpt.distributed.collectives import all_gather_json, all_gather_row
from distgpt.distributed.process_group import init_process_group
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DirectoryError, Interrupted, StorageError
from distgpt.preflight import links, network
from distgpt.preflight.equality import HostReport, compare_reports, describe_this_host, host_labels
from distgpt.preflight.finding import Finding, failure, ok, warning
from distgpt.preflight.machine import nearest_directory

# The limits of a wait for another host, and of all checks together, which usually take a few seconds.
ANSWER_SECONDS = 60.0
MAX_PREFLIGHT_SECONDS = 3 * ANSWER_SECONDS
CONNECT_SECONDS = 5.0
OPEN_PORTS = "open all TCP ports between the hosts and check their routes"
MAX_CLOCK_DIFFERENCE_SECONDS, CLOCK_READINGS = 1.0, 5
# On a network file system, other hosts may see a new file only after this time.
NFS_DIRECTORY_CACHE_SECONDS = 10.0


class SharedStore:
    """Shares JSON values with all ranks through torchrun's store, and opens a port for the other hosts to try."""

    def __init__(self, runtime: Runtime) -> None:
        """Raise Interrupted or StorageError if torchrun's store cannot be reached."""
        # Rank 0 collects the findings. It gives up first, so that the other ranks can still read its reason.
        self.timeout = timedelta(seconds=ANSWER_SECONDS * (1 if runtime.rank == 0 else 1.5))
        try:
            store: dist.Store = next(rendezvous("env://", timeout=timedelta(seconds=ANSWER_SECONDS)))[0]
        except (dist.DistError, RuntimeError):
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            error = network.connection_error(address, port, timeout=CONNECT_SECONDS)
            if error is None:
                raise Interrupted(f"{address} does not answer: torchrun on that host hangs or has ended") from None
            raise StorageError(f"{socket.gethostname()} cannot reach {address} ({error}): {OPEN_PORTS}") from None
        self.store = dist.PrefixStore("distgpt-preflight", store)
        self.runtime = runtime
        self.listener = socket.create_server(("127.0.0.1" if node_count() == 1 else "", 0), backlog=1024)

    def set(self, key: str, value: Any) -> None:
        """Share `value` with all ranks, as JSON. Dataclasses become JSON objects."""
        self.store.set(key, json.dumps(value, default=dataclasses.asdict))

    def get(self, key: str) -> Any:
        """Wait for the value of `key` and return it. Raises Interrupted after `timeout`, since a host may hang."""
        try:
            self.store.wait([key], self.timeout)
        except dist.DistError:
            raise Interrupted(f"no {key} within {self.timeout.seconds} s: read the log of that host") from None
        return json.loads(self.store.get(key))

    def wait_for_all(self) -> None:
        """Wait until all ranks call this: the host with the store must not leave before all ranks have read from it."""
        with suppress(dist.DistError):
            if self.store.add("ready to leave", 1) == self.runtime.world_size:
                self.set("all ready", True)
            self.store.wait(["all ready"], self.timeout)


def check_hosts(
    config: Config, runtime: Runtime, *, say: Callable[[Finding], None], conclude: Callable[[list[Finding]], None]
) -> None:
    """Run all checks, those of each host and those that compare hosts. Collective: all ranks call it.

    Rank 0 passes each finding to `say`. Every rank passes the failures, perhaps none, to `conclude` before any rank
    leaves. If a rank waits in vain for another one, it raises Interrupted, and rank 0 reports a failure instead.
    """
    store = SharedStore(runtime)
    failures: list[Finding] = []
    stages = (compare_hosts(config, store), check_connections(config, store), measure_network(store))
    for number, stage in enumerate(stages, 1):
        own = []  # empty except on rank 0
        try:
            for finding in stage:
                say(finding)
                own.append(finding)
        except Interrupted as error:
            if runtime.rank:
                raise
            own.append(failure("hosts", error))
            say(own[-1])
        key = f"findings from rank 0 in stage {number}"
        if runtime.rank == 0:
            store.set(key, own)
        findings = [Finding(**finding) for finding in store.get(key)]
        failures = [finding for finding in findings if finding.level == "FAIL"]
        if failures:
            break
    conclude(failures)
    store.wait_for_all()
    if dist.is_initialized() and not failures:
        dist.destroy_process_group()


def node_rank() -> int:
    """Return the number of this host in the job, from 0."""
    return int(os.environ.get("GROUP_RANK", "0"))


def node_count() -> int:
    """Return the number of hosts in the job."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def check_clocks(offsets: Mapping[str, float]) -> Finding:
    """Check that the clocks agree. `offsets`: seconds ahead of the first host's clock, by host."""
    behind, ahead = min(offsets, key=lambda h: offsets[h]), max(offsets, key=lambda h: offsets[h])
    difference = offsets[ahead] - offsets[behind]
    text = f"the clocks of {len(offsets)} hosts differ by up to {difference:.3f} s"
    if difference <= MAX_CLOCK_DIFFERENCE_SECONDS:
        return ok("clocks", text)
    return warning(
        "clocks",
        f"{text}: {ahead} is ahead of {behind}; torchrun may take a host whose clock is behind for dead: "
        "run chrony or ntpd on all hosts",
    )


def compare_hosts(config: Config, store: SharedStore) -> Iterator[Finding]:
    """Check each host by itself, then compare their versions, data and configs."""
    runtime = store.runtime
    if runtime.local_rank == 0:
        send_report(config, store)
    if runtime.rank:
        return
    answers = [store.get(_report_key(number)) for number in range(node_count())]
    reports = [HostReport(**{**a, "findings": [Finding(**f) for f in a["findings"]]}) for a in answers]
    names = host_labels(reports)
    store.set("hosts", [(name, report.address, report.port) for name, report in zip(names, reports, strict=True)])
    yield from compare_reports(names, reports)


def check_connections(config: Config, store: SharedStore) -> Iterator[Finding]:
    """Check that each host can connect to all others and can write to the run directory of the first one."""
    runtime = store.runtime
    if node_count() == 1:
        return
    answers = []
    with _marker_file(config, store) if runtime.rank == 0 else nullcontext():
        if runtime.local_rank == 0:
            answer = {"unreachable": _unreachable_hosts(store), "directory": run_directory_problem(store)}
            store.set(f"answer from host {node_rank() + 1}", answer)
        if runtime.rank == 0:
            answers = [store.get(f"answer from host {number + 1}") for number in range(node_count())]
    if runtime.rank:
        return
    by_host = {name: answer for (name, _, _), answer in zip(store.get("hosts"), answers, strict=True)}
    broken = [f"{name} cannot reach {other}" for name, answer in by_host.items() for other in answer["unreachable"]]
    if broken:
        yield failure("network", StorageError(f"{'; '.join(broken[:6])}: {OPEN_PORTS}"))
    else:
        trust = "their TCP ports are not protected: let no other machine reach them"
        yield ok("network", f"all {node_count()} hosts can connect to each other; {trust}")
    problems = [f"{name}: {answer['directory']}" for name, answer in by_host.items() if answer["directory"]]
    if problems:
        fix = "--run.dir must be on a file system that all hosts share and can write to"
        yield failure("run directory", DirectoryError(f"{'; '.join(problems)}; {fix}"))
    else:
        yield ok("shared run dir", f"all {node_count()} hosts share {config.run_dir} and can write to it")


def measure_network(store: SharedStore) -> Iterator[Finding]:
    """Create the process group; check the clocks and measure the all-reduce and the links."""
    runtime = store.runtime
    init_process_group(runtime, dist.PrefixStore("group", store.store), ANSWER_SECONDS)
    host_of = all_gather_json(node_rank()) if runtime.distributed else [node_rank()]
    offsets = clock_offsets(runtime, host_of) if node_count() > 1 else {}
    all_reduce, measured = links.measure(runtime)
    if runtime.rank:
        return
    names = [name for name, _, _ in store.get("hosts")]
    if offsets:
        yield check_clocks({names[number]: offset for number, offset in offsets.items()})
    yield all_reduce
    yield from links.check_links(measured, host_of=host_of, names=names)


def send_report(config: Config, store: SharedStore) -> None:
    """Check this host by itself and share the report. Local rank 0 calls it."""
    port = store.listener.getsockname()[1]
    report = describe_this_host(config, store.runtime, port=port, alone=node_count() == 1)
    store.set(_report_key(node_rank()), report)


def _report_key(number: int) -> str:
    return f"report from host {number + 1} of {node_count()}"


def _unreachable_hosts(store: SharedStore) -> list[str]:
    """Return the hosts to which this one cannot connect, each with the reason."""
    others = [host for number, host in enumerate(store.get("hosts")) if number != node_rank()]

    def try_host(host: tuple[str, str, int]) -> str | None:
        name, address, port = host
        error = network.connection_error(address, port, timeout=CONNECT_SECONDS)
        return error and f"{name} at {address} ({error})"

    with ThreadPoolExecutor(32) as pool:
        return [problem for problem in pool.map(try_host, others) if problem]


@contextmanager
def _marker_file(config: Config, store: SharedStore) -> Iterator[None]:
    """Create a file in rank 0's run directory, or in the directory that will hold it, for the other hosts to find."""
    path = nearest_directory(config.run_dir) / f".distgpt-preflight-{socket.gethostname()}-{os.getpid()}"
    path.touch()
    store.set("marker file", str(path))
    try:
        yield
    finally:
        for created in path.parent.glob(f"{path.name}*"):
            created.unlink(missing_ok=True)


def run_directory_problem(store: SharedStore) -> str | None:
    """Return why this host cannot use the run directory of the first host, None if it can."""
    marker = Path(store.get("marker file"))
    deadline = time.monotonic() + NFS_DIRECTORY_CACHE_SECONDS
    try:
        while marker.name not in os.listdir(marker.parent):
            if time.monotonic() > deadline:
                return f"{marker.parent} is not the same directory as on the first host"
            time.sleep(0.2)
        marker.with_name(f"{marker.name}-{node_rank()}").touch()
    except OSError as error:
        return f"{marker.parent}: {error.strerror}"
    return None


def clock_offsets(runtime: Runtime, host_of: Sequence[int]) -> dict[int, float]:
    """Return, by host, how many seconds its clock is ahead of the first host's. Collective: all ranks call it.

    All ranks read their clocks right after a barrier. The median leaves out readings that came late.
    """
    readings: list[list[float]] = []
    for _ in range(CLOCK_READINGS):
        dist.barrier()
        readings.append([row[0] for row in all_gather_row([time.time()], runtime)])
    first_ranks = {host: host_of.index(host) for host in host_of}
    return {host: statistics.median(times[rank] - times[0] for times in readings) for host, rank in first_ranks.items()}
