"""What the hosts of a job find out about each other, each played in turn by this process."""

import dataclasses
import platform
import queue
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from distgpt import config as configuration
from distgpt.corpus.shards import Dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import Interrupted, StorageError
from distgpt.preflight import hosts
from distgpt.preflight.finding import Finding
from tests import jobs

SAME = ("python", "torch", "distgpt", "data")


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, one_process: Runtime) -> Iterator[hosts.Board]:
    """Of the first of two hosts, n1 and n2, with a rank each."""
    store = dist.HashStore()
    monkeypatch.setattr(hosts, "rendezvous", lambda *_, **__: iter([(store,)]))
    for name, value in {"GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "n1")
    board = hosts.Board(dataclasses.replace(one_process, world_size=2))
    yield board
    board.listener.close()


@pytest.fixture
def config(dataset: Dataset, tmp_path: Path) -> configuration.Config:
    return settings(dataset.path, tmp_path)


def settings(data: Path, run: Path) -> configuration.Config:
    return configuration.resolve([f"--data.path={data}", f"--run.dir={run}", "--model.block_size=16"], {})


def compared(
    board: hosts.Board,
    config: configuration.Config,
    *,
    name: str = "n2",
    there: configuration.Config | None = None,
    change: Callable[[pytest.MonkeyPatch], None] = lambda other: None,
) -> dict[str, Finding]:
    """What they say of each other, by check. The second host is called `name`, and differs by `there` and `change`."""
    with pytest.MonkeyPatch.context() as other:
        other.setenv("GROUP_RANK", "1")
        other.setattr(socket, "gethostname", lambda: name)
        change(other)
        hosts.post_facts(there or config, board)
    return {finding.check: finding for finding in hosts.compare(config, board)}


def failures(findings: dict[str, Finding]) -> list[str]:
    return [check for check, finding in findings.items() if finding.level == "FAIL"]


def test_hosts_that_are_the_same(board: hosts.Board, config: configuration.Config) -> None:
    findings = compared(board, config)
    assert failures(findings) == []
    for check in SAME:
        assert findings[f"same {check}"].text.endswith("on all 2 hosts")


@pytest.mark.parametrize(
    ("check", "where", "name"), [("python", platform, "python_version"), ("torch", hosts, "torch_build")]
)
def test_other_versions(check: str, where: object, name: str, board: hosts.Board, config: configuration.Config) -> None:
    findings = compared(board, config, change=lambda other: other.setattr(where, name, lambda: "0.1"))
    assert failures(findings) == [f"same {check}"]
    assert findings[f"same {check}"].code == 2
    assert "n1 has " in findings[f"same {check}"].text
    assert "n2 has 0.1" in findings[f"same {check}"].text


def test_other_code(board: hosts.Board, config: configuration.Config, tmp_path: Path) -> None:
    copy = tmp_path / "distgpt"
    shutil.copytree(jobs.PROJECT / "distgpt", copy)
    (copy / "errors.py").open("a").write("# a change\n")
    findings = compared(board, config, change=lambda other: other.setattr(hosts, "PACKAGE", copy))
    assert failures(findings) == ["same distgpt"]
    assert findings["same distgpt"].code == 2


def test_a_copy_of_the_data_with_another_token(
    board: hosts.Board, config: configuration.Config, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(config.data.path, copy)
    with (copy / "val-00000.bin").open("r+b") as shard:
        shard.write(b"\2\0\2\0\2\0")
    findings = compared(board, config, there=settings(copy, tmp_path))
    assert failures(findings) == ["same data"]
    assert findings["same data"].code == 65


def test_hosts_of_one_name_and_address_are_told_apart(board: hosts.Board, config: configuration.Config) -> None:
    findings = compared(
        board, config, name="n1", change=lambda other: other.setattr(hosts, "torch_build", lambda: "0.1")
    )
    assert failures(findings) == ["same torch"]
    assert "n1 (127.0.0.1) #2 has 0.1" in findings["same torch"].text


def test_a_host_that_says_nothing_may_just_hang(
    board: hosts.Board, config: configuration.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training, that is worth another start; what no start can mend is not."""
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.2)
    told: list[Finding] = []
    hosts.check_hosts(config, board.runtime, say=lambda finding: None, conclude=told.extend)
    (finding,) = told
    assert (finding.code, finding.text.split(" within")[0]) == (75, "no answer of host 2 of 2")


def test_a_rank_that_hears_nothing_from_the_first_one(
    board: hosts.Board, config: configuration.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "ANSWER_SECONDS", 0.2)
    second = dataclasses.replace(board.runtime, rank=1, local_rank=1)
    with pytest.raises(Interrupted, match=r"no answer of the first host \(compare\) within"):
        hosts.check_hosts(config, second, say=lambda finding: None, conclude=lambda failures: None)


@pytest.mark.parametrize("answers", [True, False])
def test_a_store_that_cannot_be_had(answers: bool, board: hosts.Board, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Iterator[tuple[dist.Store]]:
        raise dist.DistNetworkError("no")

    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
    if not answers:
        server.close()
    monkeypatch.setattr(hosts, "rendezvous", refuse)
    expected = Interrupted if answers else StorageError
    with pytest.raises(expected, match="hangs" if answers else r"n1 cannot reach 127\.0\.0\.1"):
        hosts.Board(board.runtime)
    server.close()


def test_the_run_directory_of_the_first_host(
    board: hosts.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "VISIBLE_SECONDS", 0.0)
    marker = tmp_path / "marker"
    board.post("marker", str(marker))
    assert hosts.sees_run_directory(board) == f"{tmp_path} is another directory than the first host's"
    marker.touch()
    assert hosts.sees_run_directory(board) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marker", "marker-0"]
    board.post("marker", str(tmp_path / "none" / "marker"))
    assert hosts.sees_run_directory(board) == f"{tmp_path / 'none'}: No such file or directory"


def test_a_run_directory_that_is_not_shared(board: hosts.Board, config: configuration.Config, tmp_path: Path) -> None:
    port = board.listener.getsockname()[1]
    for why, level in (("", "ok"), ("/run is another directory than the first host's", "FAIL")):
        board.post("hosts", [("n1", "127.0.0.1", port), ("n2", "127.0.0.1", port)])
        board.post("answer from host 2", {"unreachable": [], "directory": why})
        network, directory = hosts.reach(config, board)
        assert (network.level, directory.level) == ("ok", level)
        assert list(tmp_path.iterdir()) == []
    assert (directory.code, directory.text.split(":")[0]) == (73, "n2")


def test_clocks_that_are_apart(one_process: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hosts, the second of two ranks: the first rank of each answers."""
    host_of, ahead = [0, 1, 1, 2], {0: 0.0, 1: 5.0, 2: -3.0}
    sent: dict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
    me = threading.local()

    def receive(value: torch.Tensor, source: int) -> None:
        value.copy_(sent[source, me.rank].get(timeout=60))

    def send(value: torch.Tensor, destination: int) -> None:
        sent[me.rank, destination].put(value.clone())

    def offsets(rank: int) -> dict[int, float]:
        me.rank = rank
        return hosts.clock_offsets(dataclasses.replace(one_process, rank=rank, world_size=4), host_of)

    real = time.time
    monkeypatch.setattr(hosts, "dist", SimpleNamespace(send=send, recv=receive))
    monkeypatch.setattr(hosts, "time", SimpleNamespace(time=lambda: real() + ahead[host_of[me.rank]]))
    with ThreadPoolExecutor(4) as pool:
        found, *_ = pool.map(offsets, range(4))
    assert found == pytest.approx(ahead, abs=0.5)


def test_a_name_that_means_another_address(board: hosts.Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert list(hosts.own_name("127.0.0.1")) == []  # gloo is told its interface
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    (finding,) = hosts.own_name("127.0.0.1")
    assert (finding.check, finding.level, finding.code) == ("own address", "FAIL", 2)
    assert finding.text.startswith("the name n1 means 127.0.1.1 here, but the others know this host as 127.0.0.1: ")
    assert "GLOO_SOCKET_IFNAME=lo" in finding.text
    assert list(hosts.own_name("127.0.1.1")) == []
