"""Facts that must be equal on all hosts of a job: code, versions, data and config. Each host reports its own."""

import dataclasses
import hashlib
import os
import platform
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from distgpt.config import PACKAGE, Config, to_dict
from distgpt.corpus.mixture import open_data
from distgpt.corpus.shards import Split
from distgpt.distributed.runtime import Runtime
from distgpt.errors import EXIT_DATA, EXIT_USAGE, DistgptError, UsageError
from distgpt.preflight import network
from distgpt.preflight.finding import Finding, failure, ok
from distgpt.preflight.machine import check_machine

# The hash of a split covers this number of samples, of this length.
SAMPLES, SAMPLE_TOKENS = 256, 2048
# These may differ: each host can have its own copy of the data, and a launcher clears run.fresh when it restarts.
LOCAL_KEYS = ("data.path", "run.fresh")
# By check: the fix, and the exit code if the hosts differ.
FIXES = {
    "python": ("install the same version on all hosts", EXIT_USAGE),
    "torch": ("install the same version on all hosts", EXIT_USAGE),
    "distgpt": ("copy the same code to all hosts", EXIT_USAGE),
    "data": ("prepare it once and copy it, or share one directory", EXIT_DATA),
}


@dataclass(frozen=True)
class HostReport:
    """Facts about one host and the findings of its own checks. `port`: an open port for the other hosts to try."""

    host: str
    address: str
    port: int
    findings: list[Finding]
    must_match: dict[str, str]  # by check: a value that must be equal on all hosts
    config: dict[str, str]


def describe_this_host(config: Config, runtime: Runtime, *, port: int, alone: bool) -> HostReport:
    """Check this host by itself and describe it. `port`: see HostReport. `alone`: the job has no other host."""
    address = network.route_to(os.environ["MASTER_ADDR"]).address
    findings = [*check_machine(config, runtime, thorough=False), *([] if alone else check_own_address(address))]
    must_match = {"python": platform.python_version(), "torch": torch_build(), "distgpt": package_hash()}
    with suppress(DistgptError):  # check_machine() reports an error in the data
        dataset = open_data(config.data.path)
        must_match["data"] = " ".join((dataset.fingerprint[:12], sample_hash(dataset.train), sample_hash(dataset.val)))
    flat = {f"{section}.{key}": str(value) for section, keys in to_dict(config).items() for key, value in keys.items()}
    shared = {key: value for key, value in flat.items() if key not in LOCAL_KEYS}
    return HostReport(socket.gethostname(), address, port, findings, must_match, shared)


def compare_reports(names: Sequence[str], reports: Sequence[HostReport]) -> Iterator[Finding]:
    """Merge the findings of all hosts, and compare what must be equal. `names`: a unique one for each host."""
    yield from _merge_findings(names, reports)
    if len(reports) == 1:
        return
    for check, (fix, code) in FIXES.items():
        if all(check in report.must_match for report in reports):
            values = {name: report.must_match[check] for name, report in zip(names, reports, strict=True)}
            yield check_equal(f"same {check}", values, fix=fix, code=code)
    keys = [key for key in reports[0].config if len({report.config.get(key) for report in reports}) > 1]
    if not keys:
        yield ok("same config", f"on all {len(names)} hosts")
    for key in keys:
        values = {name: report.config.get(key, "no such key") for name, report in zip(names, reports, strict=True)}
        finding = check_equal("same config", values, fix="start the same command on all hosts", code=EXIT_USAGE)
        yield dataclasses.replace(finding, text=f"{key}: {finding.text}")


def host_labels(reports: Sequence[HostReport]) -> list[str]:
    """Return a unique name for each host: its hostname, with the address or a number added if hosts share it."""
    counts = Counter(report.host for report in reports)
    names = [report.host if counts[report.host] == 1 else f"{report.host} ({report.address})" for report in reports]
    return [name if names.count(name) == 1 else f"{name} #{number}" for number, name in enumerate(names, 1)]


def check_equal(check: str, values: Mapping[str, str], *, fix: str, code: int) -> Finding:
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


def check_own_address(address: str) -> Iterator[Finding]:
    """Check that this host's name resolves to `address`, at which the other hosts reach it.

    Without GLOO_SOCKET_IFNAME, gloo gives the other hosts the address to which the hostname resolves.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:
        own = "no address"
    if own != address:
        problem = f"this host resolves its name {name} to {own}, but the other hosts reach it at {address}"
        fix = f"set GLOO_SOCKET_IFNAME={network.interface_of(address)}, or correct /etc/hosts"
        yield failure("own address", UsageError(f"{problem}: {fix}"))


def torch_build() -> str:
    """Return the versions of PyTorch and CUDA and the name of the GPU."""
    if not torch.cuda.is_available():
        return str(torch.__version__)
    return f"{torch.__version__} CUDA {torch.version.cuda} on {torch.cuda.get_device_name()}"


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


def _merge_findings(names: Sequence[str], reports: Sequence[HostReport]) -> Iterator[Finding]:
    """Merge the findings of all hosts into one for each check: the first host's if all are ok, else the worst ones."""
    by_check: dict[str, dict[str, Finding]] = {}
    for name, report in zip(names, reports, strict=True):
        for finding in report.findings:
            by_check.setdefault(finding.check, {})[name] = finding
    for by_host in by_check.values():
        levels = {finding.level for finding in by_host.values()}
        worst = next((level for level in ("FAIL", "warn") if level in levels), "ok")
        texts = {name: finding.text for name, finding in by_host.items() if finding.level == worst}
        first = next(finding for finding in by_host.values() if finding.level == worst)
        if worst == "ok" or len(reports) == 1:
            text = first.text
        elif len(set(texts.values())) == 1:
            text = f"{', '.join(texts)}: {first.text}"
        else:
            text = "; ".join(f"{name}: {text}" for name, text in texts.items())
        yield dataclasses.replace(first, text=text)
