"""The preflight of several hosts. One process runs the part of each host in turn."""

import dataclasses
import platform
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from distgpt.config import Config, resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import Interrupted, StorageError
from distgpt.preflight import equality, hosts
from distgpt.preflight.finding import Finding
from distgpt.preflight.hosts import SharedStore
from tests import jobs

SAME = ("python", "torch", "distgpt", "data")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, one_process: Runtime) -> Iterator[SharedStore]:
    """The store of host n1, the first of two hosts, n1 and n2, with one rank each."""
    torch_store = dist.HashStore()
    monkeypatch.setattr(hosts, "rendezvous", lambda *_, **__: iter([(torch_store,)]))
    for name, value in {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "n1")
    store = SharedStore(dataclasses.replace(one_process, world_size=2))
    yield store
    store.listener.close()


@pytest.fixture
def config(dataset: Dataset, tmp_path: Path) -> Config:
    return settings(dataset.path, tmp_path)


def settings(data: Path, run: Path) -> Config:
    return resolve([f"--data.path={data}", f"--run.dir={run}", "--model.block_size=16"], {})


def findings_of_two_hosts(
    store: SharedStore,
    config: Config,
    *,
    name: str = "n2",
    other_config: Config | None = None,
    change: Callable[[pytest.MonkeyPatch], None] = lambda other: None,
) -> dict[str, Finding]:
    """Compare two hosts; return the findings by check.

    The second host is called `name`. It uses `other_config`, if there is one, and `change` alters it.
    """
    with pytest.MonkeyPatch.context() as other:
        other.setenv("GROUP_RANK", "1")
        other.setattr(socket, "gethostname", lambda: name)
        change(other)
        hosts.send_report(other_config or config, store)
    return {finding.check: finding for finding in hosts.compare_hosts(config, store)}


def failures(findings: dict[str, Finding]) -> list[str]:
    return [check for check, finding in findings.items() if finding.level == "FAIL"]


def test_equal_hosts_pass(store: SharedStore, config: Config) -> None:
    findings = findings_of_two_hosts(store, config)
    assert failures(findings) == []
    for check in SAME:
        assert findings[f"same {check}"].text.endswith("on all 2 hosts")


@pytest.mark.parametrize(
    ("check", "where", "name"), [("python", platform, "python_version"), ("torch", equality, "torch_build")]
)
def test_another_version_on_one_host_fails(
    check: str, where: object, name: str, store: SharedStore, config: Config
) -> None:
    findings = findings_of_two_hosts(store, config, change=lambda other: other.setattr(where, name, lambda: "0.1"))
    assert failures(findings) == [f"same {check}"]
    assert findings[f"same {check}"].code == 2
    assert "n1 has " in findings[f"same {check}"].text
    assert "n2 has 0.1" in findings[f"same {check}"].text


def test_other_code_on_one_host_fails(store: SharedStore, config: Config, tmp_path: Path) -> None:
    copy = tmp_path / "distgpt"
    shutil.copytree(jobs.PROJECT / "distgpt", copy)
    (copy / "errors.py").open("a").write("# a change\n")
    findings = findings_of_two_hosts(store, config, change=lambda other: other.setattr(equality, "PACKAGE", copy))
    assert failures(findings) == ["same distgpt"]
    assert findings["same distgpt"].code == 2


def test_a_changed_copy_of_the_data_fails(store: SharedStore, config: Config, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(config.data.path, copy)
    with (copy / "val-00000.bin").open("r+b") as shard:
        shard.write(b"\2\0\2\0\2\0")
    findings = findings_of_two_hosts(store, config, other_config=settings(copy, tmp_path))
    assert failures(findings) == ["same data"]
    assert findings["same data"].code == 65


def test_hosts_with_the_same_name_and_address_are_numbered(store: SharedStore, config: Config) -> None:
    findings = findings_of_two_hosts(
        store, config, name="n1", change=lambda other: other.setattr(equality, "torch_build", lambda: "0.1")
    )
    assert failures(findings) == ["same torch"]
    assert "n1 (127.0.0.1) #2 has 0.1" in findings["same torch"].text


def test_a_host_without_a_report_is_worth_a_restart(
    store: SharedStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.2)
    failed: list[Finding] = []
    hosts.check_hosts(config, store.runtime, say=lambda finding: None, conclude=failed.extend)
    (finding,) = failed
    assert (finding.code, finding.text.split(" within")[0]) == (75, "no report from host 2 of 2")


def test_a_rank_without_findings_from_rank_0_is_interrupted(
    store: SharedStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.2)
    second = dataclasses.replace(store.runtime, rank=1, local_rank=1)
    with pytest.raises(Interrupted, match="no findings from rank 0 in stage 1 within"):
        hosts.check_hosts(config, second, say=lambda finding: None, conclude=lambda failures: None)


@pytest.mark.parametrize("answers", [True, False])
def test_an_unreachable_store_is_one_clear_error(
    answers: bool, store: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Iterator[tuple[dist.Store]]:
        raise dist.DistNetworkError("no")

    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
    if not answers:
        server.close()
    monkeypatch.setattr(hosts, "rendezvous", refuse)
    expected = Interrupted if answers else StorageError
    with pytest.raises(expected, match="hangs" if answers else r"n1 cannot reach 127\.0\.0\.1"):
        SharedStore(store.runtime)
    server.close()


def test_problems_with_the_first_hosts_run_directory(
    store: SharedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "NFS_DIRECTORY_CACHE_SECONDS", 0.0)
    marker = tmp_path / "marker"
    store.set("marker file", str(marker))
    assert hosts.run_directory_problem(store) == f"{tmp_path} is not the same directory as on the first host"
    marker.touch()
    assert hosts.run_directory_problem(store) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marker", "marker-0"]
    store.set("marker file", str(tmp_path / "none" / "marker"))
    assert hosts.run_directory_problem(store) == f"{tmp_path / 'none'}: No such file or directory"


def test_a_run_directory_that_is_not_shared_fails(store: SharedStore, config: Config, tmp_path: Path) -> None:
    port = store.listener.getsockname()[1]
    for problem, level in ((None, "ok"), ("/run is not the same directory as on the first host", "FAIL")):
        store.set("hosts", [("n1", "127.0.0.1", port), ("n2", "127.0.0.1", port)])
        store.set("answer from host 2", {"unreachable": [], "directory": problem})
        network, directory = hosts.check_connections(config, store)
        assert (network.level, directory.level) == ("ok", level)
        assert list(tmp_path.iterdir()) == []
    assert (directory.code, directory.text.split(":")[0]) == (73, "n2")


def test_clock_offsets_are_measured(one_process: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hosts, the second with two ranks. Looks at a clock that come late are left out."""
    late = iter([(0.0, 9.0), (9.0, 0.0), (0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])

    def gather(row: list[float], _: Runtime) -> list[list[float]]:
        first, second = next(late)
        return [[row[0] + first], [row[0] + 5.0 + second], [0.0], [row[0] - 3.0]]

    monkeypatch.setattr(hosts, "dist", SimpleNamespace(barrier=lambda: None))
    monkeypatch.setattr(hosts, "all_gather_row", gather)
    assert hosts.clock_offsets(one_process, [0, 1, 1, 2]) == pytest.approx({0: 0.0, 1: 5.0, 2: -3.0}, abs=0.2)


def test_a_hostname_with_another_address_fails(store: SharedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert list(equality.check_own_address("127.0.0.1")) == []  # GLOO_SOCKET_IFNAME is set, so the hostname is not used
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    (finding,) = equality.check_own_address("127.0.0.1")
    assert (finding.check, finding.level, finding.code) == ("own address", "FAIL", 2)
    assert finding.text.startswith(
        "this host resolves its name n1 to 127.0.1.1, but the other hosts reach it at 127.0.0.1: "
    )
    assert "GLOO_SOCKET_IFNAME=lo" in finding.text
    assert list(equality.check_own_address("127.0.1.1")) == []
