"""Do the hosts of a job fit together: one code, config and data, one clock, one run directory, all in reach?

Until each host is known to reach all others they talk through torchrun's store alone, which all of them reach: a
process group that cannot form would only say that it timed out, not who is to blame.
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
from distgpt.distributed.runtime import Runtime
from distgpt.errors import EXIT_DATA, EXIT_USAGE, DirectoryError, DistgptError, Interrupted, StorageError, UsageError
from distgpt.preflight import links, network
from distgpt.preflight.finding import Finding, failure, found, warning
from distgpt.preflight.machine import check_machine, existing

# The longest that one host waits for another, and that all checks take; a preflight is done in seconds.
ANSWER_SECONDS = 60.0
LONGEST_SECONDS = 3 * ANSWER_SECONDS
CONNECT_SECONDS = 5.0
OPEN_PORTS = "open all TCP ports between the hosts, check their routes"
CLOCK_SECONDS = 1.0
# A network file system may show a new file late.
VISIBLE_SECONDS = 10.0
SAMPLES, SAMPLE_TOKENS = 256, 2048
# What may differ: where each host has its copy of the data, and whether its launcher started again.
LOCAL_KEYS = ("data.path", "run.fresh")


@dataclass(frozen=True)
class Facts:
    """What a host says of itself."""

    host: str
    address: str
    port: int
    findings: list[dict[str, Any]]
    same: dict[str, str] = field(default_factory=dict)  # check -> what must be equal everywhere
    config: dict[str, str] = field(default_factory=dict)


Say = Callable[[Finding], None]


class Board:
    """Notes between ranks in torchrun's store, and a port for the other hosts to try."""

    def __init__(self, runtime: Runtime) -> None:
        # Rank 0, which judges, gives up first, so that the others still hear from it why.
        self.timeout = timedelta(seconds=ANSWER_SECONDS * (1 if runtime.rank == 0 else 1.5))
        try:
            store: dist.Store = next(rendezvous("env://", timeout=timedelta(seconds=ANSWER_SECONDS)))[0]
        except (dist.DistError, RuntimeError):
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            why = network.can_connect(address, port, timeout=CONNECT_SECONDS)
            if why is None:
                raise Interrupted(f"{address} does not answer: it hangs or has ended") from None
            raise StorageError(f"{socket.gethostname()} cannot reach {address} ({why}): {OPEN_PORTS}") from None
        self.store = dist.PrefixStore("distgpt-preflight", store)
        self.runtime = runtime
        self.listener = socket.create_server(("127.0.0.1" if nodes() == 1 else "", 0), backlog=1024)

    def post(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """What was posted under `key`, when it is there. Raises Interrupted if it does not come: its host may hang."""
        try:
            self.store.wait([key], self.timeout)
        except dist.DistError:
            raise Interrupted(f"no {key} within {self.timeout.seconds} s: see the log of that host") from None
        return json.loads(self.store.get(key))

    def leave_together(self) -> None:
        """The store dies with the host that holds it, so nobody leaves before everybody has read the findings."""
        with suppress(dist.DistError):
            if self.store.add("leaving", 1) == self.runtime.world_size:
                self.post("all leave", True)
            self.store.wait(["all leave"], self.timeout)


def check_hosts(config: Config, runtime: Runtime, *, say: Say, conclude: Callable[[list[Finding]], None]) -> None:
    """Every check that takes all hosts, with those of each one. All ranks call it; rank 0 alone says what it found.

    Each rank is told the failures that ended it, or none, by `conclude`, before any of them leaves.
    """
    board = Board(runtime)
    failures: list[Finding] = []
    for stage in (compare, reach, connect):
        told = []
        try:
            for finding in stage(config, board):
                say(finding)
                told.append(finding)
        except Interrupted as error:
            if runtime.rank:
                raise
            told.append(failure("hosts", error))
            say(told[-1])
        key = f"answer of the first host ({stage.__name__})"
        if runtime.rank == 0:
            board.post(key, [dataclasses.asdict(finding) for finding in told])
        findings = [Finding(**finding) for finding in board.read(key)]
        failures = [finding for finding in findings if finding.level == "FAIL"]
        if failures:
            break
    conclude(failures)
    board.leave_together()
    if dist.is_initialized() and not failures:
        dist.destroy_process_group()


def node() -> int:
    """The number of this host in the job."""
    return int(os.environ.get("GROUP_RANK", "0"))


def nodes() -> int:
    """The number of hosts."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def labels(everyone: Sequence[Facts]) -> list[str]:
    """A name for each host, with its address, and its number too, where the name alone would not tell."""
    counts = Counter(facts.host for facts in everyone)
    names = [facts.host if counts[facts.host] == 1 else f"{facts.host} ({facts.address})" for facts in everyone]
    return [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, 1)]


def agreement(check: str, values: Mapping[str, str], *, fix: str, code: int = EXIT_USAGE) -> Finding:
    """That all hosts have the same value; otherwise, who has another one. `values`: by host."""
    counts = Counter(values.values())
    if len(counts) == 1:
        return found(check, f"{next(iter(counts))} on all {len(values)} hosts")
    (common, times), (_, next_times) = counts.most_common(2)
    odd = {host: value for host, value in values.items() if value != common}
    if times == next_times:
        told = ", ".join(f"{host} has {value}" for host, value in values.items())
    else:
        told = ", ".join(f"{host} has {value}" for host, value in odd.items()) + f", the other {times} {common}"
    return Finding(check, "FAIL", f"{told}: {fix}", code)


def judge_clocks(offsets: Mapping[str, float]) -> Finding:
    """How far the clocks are apart; `offsets` in seconds against the first host's, by host."""
    first, last = min(offsets, key=lambda h: offsets[h]), max(offsets, key=lambda h: offsets[h])
    spread = offsets[last] - offsets[first]
    text = f"{spread:.3f} s apart on all {len(offsets)} hosts"
    if spread <= CLOCK_SECONDS:
        return found("clocks", text)
    return warning(
        "clocks",
        f"{text}: {last} is ahead of {first}; torchrun takes a host that is behind for dead: run chrony or ntpd",
    )


def package_hash() -> str:
    """Of the code that runs: every file of the package."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".toml")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def data_sample(split: Split) -> str:
    """A hash over places spread evenly over the tokens: reading all of them is the thorough check's business."""
    digest = hashlib.sha256()
    samples = max(1, SAMPLES // len(split.shards))
    for shard in split.shards:
        stride = max(1, len(shard) // samples)
        for start in range(0, len(shard), stride):
            digest.update(shard[start : start + SAMPLE_TOKENS].tobytes())
    return digest.hexdigest()[:12]


def compare(config: Config, board: Board) -> Iterator[Finding]:
    """What each host says of itself, side by side."""
    runtime = board.runtime
    if runtime.local_rank == 0:
        post_facts(config, board)
    if runtime.rank:
        return
    everyone = [Facts(**board.read(_facts_of(number))) for number in range(nodes())]
    names = labels(everyone)
    board.post("hosts", [(name, facts.address, facts.port) for name, facts in zip(names, everyone, strict=True)])
    yield from _merged(names, everyone)
    if nodes() == 1:
        return
    for check, fix, code in (
        ("python", "install the same on all hosts", EXIT_USAGE),
        ("torch", "install the same on all hosts", EXIT_USAGE),
        ("distgpt", "bring the same code to all hosts", EXIT_USAGE),
        ("data", "prepare it once and copy it, or share one directory", EXIT_DATA),
    ):
        if all(check in facts.same for facts in everyone):
            values = {name: facts.same[check] for name, facts in zip(names, everyone, strict=True)}
            yield agreement(f"same {check}", values, fix=fix, code=code)
    yield from _same_config(names, everyone)


def reach(config: Config, board: Board) -> Iterator[Finding]:
    """Each host connects to all others, and sees the run directory of the first."""
    runtime = board.runtime
    if nodes() == 1:
        return
    answers = []
    with _marker(config, board) if runtime.rank == 0 else nullcontext():
        if runtime.local_rank == 0:
            answer = {"unreachable": _unreachable(board), "directory": sees_run_directory(board)}
            board.post(f"answer from host {node() + 1}", answer)
        if runtime.rank == 0:
            answers = [board.read(f"answer from host {number + 1}") for number in range(nodes())]
    if runtime.rank:
        return
    names = _names(board)
    of_host = dict(zip(names, answers, strict=True))
    broken = [f"{name} cannot reach {other}" for name, answer in of_host.items() for other in answer["unreachable"]]
    if broken:
        yield failure("network", StorageError(f"{'; '.join(broken[:6])}: {OPEN_PORTS}"))
    else:
        trust = "they trust each other, so no stranger may reach their TCP ports"
        yield found("network", f"all {nodes()} hosts can connect to each other; {trust}")
    blind = {name: answer["directory"] for name, answer in of_host.items() if answer["directory"]}
    if blind:
        told = "; ".join(f"{name}: {why}" for name, why in blind.items())
        fix = "--run.dir must lie on a file system that all hosts share and can write to"
        yield failure("run directory", DirectoryError(f"{told}; {fix}"))
    else:
        yield found("shared run dir", f"{config.run_dir} is the same, and can be written, on all {nodes()} hosts")


def connect(config: Config, board: Board) -> Iterator[Finding]:
    """With a process group: clocks, all-reduce, links."""
    runtime = board.runtime
    on_gpu = runtime.device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=dist.PrefixStore("group", board.store),
        rank=runtime.rank,
        world_size=runtime.world_size,
        timeout=timedelta(seconds=ANSWER_SECONDS),
        device_id=runtime.device if on_gpu else None,
    )
    if on_gpu:
        torch.cuda.set_device(runtime.device)
    host_of = all_gather_json(node()) if runtime.distributed else [node()]
    offsets = clock_offsets(runtime, host_of)
    all_reduce, measured = (
        links.measure(runtime) if runtime.distributed else (found("links", "one rank, none to measure"), [])
    )
    if runtime.rank:
        return
    names = _names(board)
    if len(names) > 1:
        yield judge_clocks({names[number]: offset for number, offset in offsets.items()})
    yield all_reduce
    yield from links.judge(measured, host_of=host_of, names=dict(enumerate(names)))


def post_facts(config: Config, board: Board) -> None:
    """Local rank 0: everything this host can tell without the others."""
    address = network.route_to(os.environ["MASTER_ADDR"]).address
    findings = [dataclasses.asdict(f) for f in check_machine(config, board.runtime, thorough=False)]
    findings += [dataclasses.asdict(f) for f in own_name(address)]
    same = {
        "python": platform.python_version(),
        "torch": torch_build(),
        "distgpt": package_hash(),
    }
    with suppress(DistgptError):  # check_machine said so
        dataset = open_dataset(Path(config.data.path))
        same["data"] = " ".join((dataset.fingerprint[:12], data_sample(dataset.train), data_sample(dataset.val)))
    flat = {f"{section}.{key}": str(value) for section, keys in to_dict(config).items() for key, value in keys.items()}
    facts = Facts(
        socket.gethostname(),
        address,
        board.listener.getsockname()[1],
        findings,
        same,
        {key: value for key, value in flat.items() if key not in LOCAL_KEYS},
    )
    board.post(_facts_of(node()), dataclasses.asdict(facts))


def _facts_of(number: int) -> str:
    return f"answer of host {number + 1} of {nodes()}"


def own_name(address: str) -> Iterator[Finding]:
    """gloo and NCCL tell the others the address of their interface, or, if they are told none, of the hostname."""
    if nodes() == 1 or os.environ.get("GLOO_SOCKET_IFNAME"):
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
                f"the name {name} means {own} here, but the others know this host as {address}: "
                f"set GLOO_SOCKET_IFNAME={interface}, or correct /etc/hosts"
            ),
        )


def torch_build() -> str:
    parts: list[object] = [torch.__version__]
    if torch.cuda.is_available():
        parts += ["CUDA", torch.version.cuda, "on", torch.cuda.get_device_name()]
    return " ".join(map(str, parts))


def _merged(names: Sequence[str], everyone: Sequence[Facts]) -> Iterator[Finding]:
    """The findings of all hosts, one line a check: the first host's where all is well, else those that stand out."""
    by_check: dict[str, dict[str, Finding]] = {}
    for name, facts in zip(names, everyone, strict=True):
        for finding in facts.findings:
            by_check.setdefault(finding["check"], {})[name] = Finding(**finding)
    for check, of_host in by_check.items():
        worst = next((level for level in ("FAIL", "warn") if any(f.level == level for f in of_host.values())), None)
        if worst is None:
            yield next(iter(of_host.values()))
            continue
        odd = {name: finding for name, finding in of_host.items() if finding.level == worst}
        texts = {finding.text for finding in odd.values()}
        if len(everyone) == 1:
            told = texts.pop()
        elif len(texts) == 1:
            told = f"{', '.join(odd)}: {texts.pop()}"
        else:
            told = "; ".join(f"{name}: {finding.text}" for name, finding in odd.items())
        yield dataclasses.replace(next(iter(odd.values())), text=told, check=check)


def _same_config(names: Sequence[str], everyone: Sequence[Facts]) -> Iterator[Finding]:
    keys = [key for key in everyone[0].config if len({facts.config.get(key) for facts in everyone}) > 1]
    if not keys:
        yield found("same config", f"on all {len(names)} hosts")
    for key in keys:
        values = {name: facts.config.get(key, "no such key") for name, facts in zip(names, everyone, strict=True)}
        finding = agreement("same config", values, fix="start the same command on all hosts")
        yield dataclasses.replace(finding, text=f"{key}: {finding.text}")


def _unreachable(board: Board) -> list[str]:
    """Who cannot be connected to from here, and why."""
    others = [host for number, host in enumerate(board.read("hosts")) if number != node()]

    def why_not(host: tuple[str, str, int]) -> str | None:
        name, address, port = host
        why = network.can_connect(address, port, timeout=CONNECT_SECONDS)
        return why and f"{name} at {address} ({why})"

    with ThreadPoolExecutor(32) as pool:
        return [reason for reason in pool.map(why_not, others) if reason]


@contextmanager
def _marker(config: Config, board: Board) -> Iterator[None]:
    """A file of rank 0 in the run directory, or where that will be, for the others to find."""
    path = existing(config.run_dir) / f".distgpt-preflight-{socket.gethostname()}-{os.getpid()}"
    path.touch()
    board.post("marker", str(path))
    try:
        yield
    finally:
        for made in path.parent.glob(f"{path.name}*"):
            made.unlink(missing_ok=True)


def sees_run_directory(board: Board) -> str:
    """Why this host cannot use the run directory of the first one; empty if it can."""
    marker = Path(board.read("marker"))
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            if marker.name in os.listdir(marker.parent):
                break
        except OSError as error:
            return f"{marker.parent}: {error.strerror}"
        if time.monotonic() > deadline:
            return f"{marker.parent} is another directory than the first host's"
        time.sleep(0.2)
    try:
        marker.with_name(f"{marker.name}-{node()}").touch()
    except OSError as error:
        return f"cannot write to {marker.parent}: {error.strerror}"
    return ""


def clock_offsets(runtime: Runtime, host_of: Sequence[int]) -> dict[int, float]:
    """By host, seconds that its clock is ahead of the first host's: the reply to the quickest of a few questions."""
    offsets = {host_of[0]: 0.0}
    now = torch.zeros(1, dtype=torch.float64)
    for number in sorted(set(host_of)):
        rank = host_of.index(number)
        quickest = float("inf")
        for _ in range(5 if rank and runtime.rank in (0, rank) else 0):
            if runtime.rank == rank:
                dist.recv(now, 0)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0)
                continue
            asked = time.time()
            dist.send(now, rank)
            dist.recv(now, rank)
            answered = time.time()
            if answered - asked < quickest:
                quickest = answered - asked
                offsets[number] = now.item() - (asked + answered) / 2
    return offsets


def _names(board: Board) -> list[str]:
    return [name for name, _, _ in board.read("hosts")]
