"""Checks of all hosts of a job: same code, config and data, equal clocks, one run directory, open connections.

The checks run in three stages. The first two use only torchrun's store, which every host can reach: a process group
that cannot form reports a timeout, but not which host is the cause. The third stage creates the process group.
"""

import dataclasses
import hashlib
import json
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distgpt.config import PACKAGE, Config, to_dict
from distgpt.corpus.shards import Split, open_dataset
from distgpt.distributed.collectives import all_gather_json
from distgpt.distributed.process_group import init_process_group
from distgpt.distributed.runtime import Runtime
from distgpt.errors import EXIT_DATA, EXIT_USAGE, DirectoryError, DistgptError, Interrupted, StorageError, UsageError
from distgpt.preflight import links, network
from distgpt.preflight.finding import Finding, failure, ok, warning
from distgpt.preflight.machine import check_machine, nearest_directory

# The longest wait for another host, and the longest time for all checks, which usually take a few seconds.
ANSWER_SECONDS = 60.0
LONGEST_SECONDS = 3 * ANSWER_SECONDS
CONNECT_SECONDS = 5.0
OPEN_PORTS = "open all TCP ports between the hosts and check their routes"
MAX_CLOCK_DIFFERENCE_SECONDS = 1.0
# A network file system may show a new file this late on other hosts.
NFS_DIRECTORY_CACHE_SECONDS = 10.0
# Number and length of the samples of a split that are hashed.
SAMPLES, SAMPLE_TOKENS = 256, 2048
# These may differ: each host can have its own copy of the data, and a launcher clears run.fresh when it restarts.
LOCAL_KEYS = ("data.path", "run.fresh")


@dataclass(frozen=True)
class HostReport:
    """Facts about one host and the findings of its own checks. `port`: an open port for the other hosts to try."""

    host: str
    address: str
    port: int
    findings: list[dict[str, Any]]
    must_match: dict[str, str] = field(default_factory=dict)  # by check: a value that must be equal on all hosts
    config: dict[str, str] = field(default_factory=dict)


class SharedStore:
    """JSON values that all ranks share in torchrun's store, and an open port for the other hosts to try.

    Raises Interrupted or StorageError if torchrun's store cannot be reached.
    """

    def __init__(self, runtime: Runtime) -> None:
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
        """Share `value`, which must be JSON, with all ranks."""
        self.store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """Wait for the value of `key` and return it. Raises Interrupted after `timeout`: a host may hang."""
        try:
            self.store.wait([key], self.timeout)
        except dist.DistError:
            raise Interrupted(f"no {key} within {self.timeout.seconds} s: read the log of that host") from None
        return json.loads(self.store.get(key))

    def wait_for_all(self) -> None:
        """Wait until all ranks call this: the host that holds the store must not leave before all have read it."""
        with suppress(dist.DistError):
            if self.store.add("ready to leave", 1) == self.runtime.world_size:
                self.set("all ready", True)
            self.store.wait(["all ready"], self.timeout)


def check_hosts(
    config: Config, runtime: Runtime, *, say: Callable[[Finding], None], conclude: Callable[[list[Finding]], None]
) -> None:
    """Run all checks, those of each host and those that compare hosts. Collective: all ranks call it.

    Rank 0 passes each finding to `say`. Every rank passes the failures, if any, to `conclude` before any rank leaves.
    A rank that waits in vain for another one raises Interrupted; rank 0 makes this a failure instead.
    """
    store = SharedStore(runtime)
    failures: list[Finding] = []
    for stage in (compare_hosts, check_connections, measure_network):
        made = []
        try:
            for finding in stage(config, store):
                say(finding)
                made.append(finding)
        except Interrupted as error:
            if runtime.rank:
                raise
            made.append(failure("hosts", error))
            say(made[-1])
        key = f"findings from rank 0 ({stage.__name__})"
        if runtime.rank == 0:
            store.set(key, [dataclasses.asdict(finding) for finding in made])
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


def host_labels(reports: Sequence[HostReport]) -> list[str]:
    """Return a unique name for each host: its hostname, with the address or a number added if hosts share it."""
    counts = Counter(report.host for report in reports)
    names = [report.host if counts[report.host] == 1 else f"{report.host} ({report.address})" for report in reports]
    return [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, 1)]


def check_equal(check: str, values: Mapping[str, str], *, fix: str, code: int = EXIT_USAGE) -> Finding:
    """Check that all hosts have the same value, and name those that differ. `values`: by host."""
    counts = Counter(values.values())
    if len(counts) == 1:
        return ok(check, f"{next(iter(counts))} on all {len(values)} hosts")
    (common, count), (_, next_count) = counts.most_common(2)
    has_majority = count > next_count
    listed = [f"{host} has {value}" for host, value in values.items() if value != common or not has_majority]
    if has_majority:
        listed.append(f"the other {count} have {common}")
    return Finding(check, "FAIL", f"{', '.join(listed)}: {fix}", code)


def check_clocks(offsets: Mapping[str, float]) -> Finding:
    """Check that the clocks agree. `offsets`: seconds ahead of the first host's clock, by host."""
    behind, ahead = min(offsets, key=lambda h: offsets[h]), max(offsets, key=lambda h: offsets[h])
    difference = offsets[ahead] - offsets[behind]
    text = f"the clocks of {len(offsets)} hosts differ by up to {difference:.3f} s"
    if difference <= MAX_CLOCK_DIFFERENCE_SECONDS:
        return ok("clocks", text)
    return warning(
        "clocks",
        f"{text}: {ahead} is ahead of {behind}; torchrun may treat a host whose clock is behind as dead: "
        "run chrony or ntpd on all hosts",
    )


def package_hash() -> str:
    """Return a short hash of the code that runs: all .py and .toml files of the package."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".toml")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def sample_hash(split: Split) -> str:
    """Return a short hash of samples spread evenly over the tokens. Reading all tokens would take too long here."""
    digest = hashlib.sha256()
    samples = max(1, SAMPLES // len(split.shards))
    for shard in split.shards:
        stride = max(1, len(shard) // samples)
        for start in range(0, len(shard), stride):
            digest.update(shard[start : start + SAMPLE_TOKENS].tobytes())
    return digest.hexdigest()[:12]


def compare_hosts(config: Config, store: SharedStore) -> Iterator[Finding]:
    """Check each host by itself, then compare their versions, data and configs."""
    runtime = store.runtime
    if runtime.local_rank == 0:
        send_report(config, store)
    if runtime.rank:
        return
    reports = [HostReport(**store.get(_report_key(number))) for number in range(node_count())]
    names = host_labels(reports)
    store.set("hosts", [(name, report.address, report.port) for name, report in zip(names, reports, strict=True)])
    yield from _merge_findings(names, reports)
    if node_count() == 1:
        return
    for check, fix, code in (
        ("python", "install the same version on all hosts", EXIT_USAGE),
        ("torch", "install the same version on all hosts", EXIT_USAGE),
        ("distgpt", "copy the same code to all hosts", EXIT_USAGE),
        ("data", "prepare it once and copy it, or share one directory", EXIT_DATA),
    ):
        if all(check in report.must_match for report in reports):
            values = {name: report.must_match[check] for name, report in zip(names, reports, strict=True)}
            yield check_equal(f"same {check}", values, fix=fix, code=code)
    yield from _compare_configs(names, reports)


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
    names = _host_names(store)
    by_host = dict(zip(names, answers, strict=True))
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


def measure_network(config: Config, store: SharedStore) -> Iterator[Finding]:
    """Create the process group; check the clocks and measure the all-reduce and the links."""
    runtime = store.runtime
    init_process_group(runtime, dist.PrefixStore("group", store.store), ANSWER_SECONDS)
    host_of = all_gather_json(node_rank()) if runtime.distributed else [node_rank()]
    offsets = clock_offsets(runtime, host_of)
    all_reduce, measured = links.measure(runtime)
    if runtime.rank:
        return
    names = _host_names(store)
    if len(names) > 1:
        yield check_clocks({names[number]: offset for number, offset in offsets.items()})
    yield all_reduce
    yield from links.check_links(measured, host_of=host_of, names=dict(enumerate(names)))


def send_report(config: Config, store: SharedStore) -> None:
    """Check this host by itself and share the report. Local rank 0 calls it."""
    address = network.route_to(os.environ["MASTER_ADDR"]).address
    findings = [dataclasses.asdict(f) for f in check_machine(config, store.runtime, thorough=False)]
    findings += [dataclasses.asdict(f) for f in check_own_address(address)]
    must_match = {"python": platform.python_version(), "torch": torch_build(), "distgpt": package_hash()}
    with suppress(DistgptError):  # check_machine reports it
        dataset = open_dataset(Path(config.data.path))
        must_match["data"] = " ".join((dataset.fingerprint[:12], sample_hash(dataset.train), sample_hash(dataset.val)))
    flat = {f"{section}.{key}": str(value) for section, keys in to_dict(config).items() for key, value in keys.items()}
    report = HostReport(
        socket.gethostname(),
        address,
        store.listener.getsockname()[1],
        findings,
        must_match,
        {key: value for key, value in flat.items() if key not in LOCAL_KEYS},
    )
    store.set(_report_key(node_rank()), dataclasses.asdict(report))


def _report_key(number: int) -> str:
    return f"report from host {number + 1} of {node_count()}"


def check_own_address(address: str) -> Iterator[Finding]:
    """Check that this host's name resolves to `address`, at which the other hosts reach it.

    Without GLOO_SOCKET_IFNAME, gloo gives the other hosts the address to which the hostname resolves.
    """
    if node_count() == 1 or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        own = "no address"
    if own != address:
        interface = network.interface_of(address)
        yield failure(
            "own address",
            UsageError(
                f"this host resolves its name {name} to {own}, but the other hosts reach it at {address}: "
                f"set GLOO_SOCKET_IFNAME={interface}, or correct /etc/hosts"
            ),
        )


def torch_build() -> str:
    """Return the versions of PyTorch and CUDA and the name of the GPU."""
    parts: list[object] = [torch.__version__]
    if torch.cuda.is_available():
        parts += ["CUDA", torch.version.cuda, "on", torch.cuda.get_device_name()]
    return " ".join(map(str, parts))


def _merge_findings(names: Sequence[str], reports: Sequence[HostReport]) -> Iterator[Finding]:
    """Merge the findings of all hosts, one per check: the first host's if all are ok, else those of the worst level."""
    by_check: dict[str, dict[str, Finding]] = {}
    for name, report in zip(names, reports, strict=True):
        for finding in report.findings:
            by_check.setdefault(finding["check"], {})[name] = Finding(**finding)
    for by_host in by_check.values():
        levels = {finding.level for finding in by_host.values()}
        worst = next((level for level in ("FAIL", "warn") if level in levels), "ok")
        worst_findings = {name: finding for name, finding in by_host.items() if finding.level == worst}
        first = next(iter(worst_findings.values()))
        texts = {finding.text for finding in worst_findings.values()}
        if worst == "ok" or len(reports) == 1:
            text = first.text
        elif len(texts) == 1:
            text = f"{', '.join(worst_findings)}: {first.text}"
        else:
            text = "; ".join(f"{name}: {finding.text}" for name, finding in worst_findings.items())
        yield dataclasses.replace(first, text=text)


def _compare_configs(names: Sequence[str], reports: Sequence[HostReport]) -> Iterator[Finding]:
    keys = [key for key in reports[0].config if len({report.config.get(key) for report in reports}) > 1]
    if not keys:
        yield ok("same config", f"on all {len(names)} hosts")
    for key in keys:
        values = {name: report.config.get(key, "no such key") for name, report in zip(names, reports, strict=True)}
        finding = check_equal("same config", values, fix="start the same command on all hosts")
        yield dataclasses.replace(finding, text=f"{key}: {finding.text}")


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
    while True:
        try:
            if marker.name in os.listdir(marker.parent):
                break
        except OSError as error:
            return f"{marker.parent}: {error.strerror}"
        if time.monotonic() > deadline:
            return f"{marker.parent} is not the same directory as on the first host"
        time.sleep(0.2)
    try:
        marker.with_name(f"{marker.name}-{node_rank()}").touch()
    except OSError as error:
        return f"cannot write to {marker.parent}: {error.strerror}"
    return None


def clock_offsets(runtime: Runtime, host_of: Sequence[int]) -> dict[int, float]:
    """Return on rank 0, by host, how many seconds its clock is ahead of the first host's.

    Rank 0 asks the first rank of each host for the time and uses the answer with the shortest round trip.
    """
    offsets = {host_of[0]: 0.0}
    now = torch.zeros(1, dtype=torch.float64)
    for number in sorted(set(host_of)):
        rank = host_of.index(number)
        shortest = float("inf")
        for _ in range(5 if rank and runtime.rank in (0, rank) else 0):
            if runtime.rank == rank:
                dist.recv(now, 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
                continue
            asked = time.time()
            dist.send(now, rank)
            dist.recv(now, rank)
            answered = time.time()
            if answered - asked < shortest:
                shortest = answered - asked
                offsets[number] = now.item() - (asked + answered) / 2
    return offsets


def _host_names(store: SharedStore) -> list[str]:
    return [name for name, _, _ in store.get("hosts")]
