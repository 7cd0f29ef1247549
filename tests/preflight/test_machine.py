"""What the checks before a run conclude from what they find."""

import dataclasses
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distgpt import config as configuration
from distgpt.corpus.order import Order
from distgpt.corpus.shards import Dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DirectoryError, Interrupted, StorageError, UsageError
from distgpt.model.gpt import count_parameters
from distgpt.preflight import hosts, links, machine, network
from distgpt.preflight.finding import Finding
from distgpt.preflight.links import Link
from distgpt.run import lock
from distgpt.run.lock import RunLock, lock_holder
from distgpt.run.paths import RunPaths

ONE_PROCESS = Runtime(0, 0, 1, 1, torch.device("cpu"))


def config(*arguments: str) -> configuration.Config:
    return configuration.resolve([*arguments, "--model.block_size=16"], {})


def room(monkeypatch: pytest.MonkeyPatch, **free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free["disk"]))


def test_too_little_disk(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(f"--run.dir={tmp_path / 'run'}", "--checkpoint.keep=3")
    one = 12 * count_parameters(wanted.model, dataset.vocab_size)
    room(monkeypatch, disk=6 * one)
    assert machine.disk(wanted, ONE_PROCESS, dataset).level == "ok"
    room(monkeypatch, disk=4 * one)
    finding = machine.disk(wanted, ONE_PROCESS, dataset)
    assert finding.level == "warn"
    assert "up to 5 are kept" in finding.text
    room(monkeypatch, disk=one // 2)
    with pytest.raises(StorageError, match="MiB free and a checkpoint takes"):
        machine.disk(wanted, ONE_PROCESS, dataset)


def test_checkpoints_that_are_there_need_no_more_room(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(f"--run.dir={tmp_path}", "--checkpoint.keep=3")
    for step in range(4):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    room(monkeypatch, disk=2 * 12 * count_parameters(wanted.model, dataset.vocab_size))
    assert machine.disk(wanted, ONE_PROCESS, dataset).level == "ok"


def test_too_little_memory(dataset: Dataset, one_process: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config()
    need = 28 * count_parameters(wanted.model, dataset.vocab_size)
    for available, level in ((2 * need, "ok"), (1.2 * need, "warn")):
        monkeypatch.setattr(machine, "free_memory", partial(float, available))
        assert machine.memory(wanted, one_process, dataset).level == level
    monkeypatch.setattr(machine, "free_memory", lambda: 0.9 * need)
    with pytest.raises(UsageError, match="before activations: shard over more ranks"):
        machine.memory(wanted, one_process, dataset)


@pytest.mark.parametrize(("strategy", "shards"), [("ddp", 1), ("fsdp", 4), ("hsdp", 2)])
def test_memory_counts_the_shards(
    strategy: str, shards: int, dataset: Dataset, one_process: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(f"--parallel.strategy={strategy}")
    runtime = dataclasses.replace(one_process, world_size=4, local_world_size=2)
    need = 28 * count_parameters(wanted.model, dataset.vocab_size) / shards
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * need * 1.01)
    assert machine.memory(wanted, runtime, dataset).level == "warn"
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * need * 0.99)
    with pytest.raises(UsageError, match=strategy):
        machine.memory(wanted, runtime, dataset)


def test_too_little_shared_memory(one_process: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    room(monkeypatch, disk=2**20)
    finding = machine.shared_memory(one_process)
    assert finding.level == "warn"
    assert "--shm-size" in finding.text


def test_windows_are_counted_as_training_draws_them(dataset: Dataset) -> None:
    wanted = config("--train.steps=3", "--train.global_batch=8", "--eval.sequences=5")
    drawn = Order([len(shard) for shard in dataset.train.shards], block_size=16, seed=0).windows
    assert machine.windows(wanted, dataset).text == (
        f"{drawn:,} of 16 tokens to train on, 5 to evaluate on; 3 steps see the training text {24 / drawn:.3g} times"
    )


def test_more_than_ten_epochs_are_a_warning(dataset: Dataset) -> None:
    windows = Order([len(shard) for shard in dataset.train.shards], block_size=16, seed=0).windows
    enough = 10 * windows // 8
    assert machine.windows(config(f"--train.steps={enough}", "--train.global_batch=8"), dataset).level == "ok"
    finding = machine.windows(config("--train.steps=572000", "--train.global_batch=8"), dataset)
    assert finding.level == "warn"
    assert f"see the training text {572000 * 8 / windows:,.0f} times" in finding.text
    assert f"with --train.steps={enough}" in finding.text


def test_the_run_directory_is_left_as_it_was(dataset: Dataset, tmp_path: Path) -> None:
    finding = machine.run_directory(config(f"--run.dir={tmp_path / 'a' / 'b'}"), ONE_PROCESS, dataset)
    assert (finding.level, list(tmp_path.iterdir())) == ("ok", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match="is in the way"):
        machine.run_directory(config(f"--run.dir={tmp_path / 'file' / 'run'}"), ONE_PROCESS, dataset)


def test_who_holds_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE", 0.5)  # for as long a living owner is watched
    paths = RunPaths(tmp_path)
    assert lock_holder(paths) is None
    assert list(tmp_path.iterdir()) == []
    held = RunLock(paths)
    assert (lock_holder(paths) or "").startswith(f"pid {os.getpid()} on ")
    with pytest.raises(DirectoryError, match="in use by pid"):
        machine.run_directory(config(f"--run.dir={tmp_path}"), ONE_PROCESS, None)  # type: ignore[arg-type]
    held.release()
    assert lock_holder(paths) is None


def test_agreement_names_who_differs() -> None:
    def told(**values: str) -> str:
        return hosts.agreement("torch", values, fix="do this").text

    assert hosts.agreement("torch", {"a": "1", "b": "1"}, fix="").level == "ok"
    assert told(a="1", b="2") == "a has 1, b has 2: do this"
    assert told(a="1", b="2", c="1") == "b has 2, the other 2 1: do this"
    assert told(a="1", b="2", c="1", d="3", e="1") == "b has 2, d has 3, the other 3 1: do this"


def test_clocks() -> None:
    assert hosts.judge_clocks({"a": 0.0, "b": 0.4, "c": -0.5}).level == "ok"
    finding = hosts.judge_clocks({"a": 0.0, "b": 0.4, "c": -0.7})
    assert finding.level == "warn"
    assert finding.text.startswith("1.100 s apart on all 3 hosts: b is ahead of c")


def test_hosts_of_one_name_are_told_apart() -> None:
    named = [hosts.Facts(name, f"10.0.0.{i}", 1, []) for i, name in enumerate(["node", "other", "node"])]
    assert hosts.labels(named) == ["node (10.0.0.0)", "other", "node (10.0.0.2)"]


def test_the_hash_of_the_code_and_the_sample_of_the_data(dataset: Dataset, other_dataset: Dataset) -> None:
    assert hosts.package_hash() == hosts.package_hash()
    assert hosts.data_sample(dataset.train) == hosts.data_sample(dataset.train)
    assert hosts.data_sample(dataset.train) != hosts.data_sample(other_dataset.train)


def ring(rates: dict[tuple[int, int], float], *, delays: dict[tuple[int, int], float] | None = None) -> Iterator[Link]:
    """Links of 4 ranks on 4 hosts in both directions, 1 GB/s and 50 us each where not told otherwise."""
    for first in range(4):
        for link in ((first, (first + 1) % 4), ((first + 1) % 4, first)):
            yield Link(*link, rates.get(link, 1e9), (delays or {}).get(link, 5e-5))


def judged(*measured: Link) -> Finding:
    (finding,) = links.judge(measured, host_of=[0, 1, 2, 3], names=dict(enumerate("abcd")))
    return finding


def test_equal_links() -> None:
    finding = judged(*ring({(2, 3): 0.9e9}))
    assert (finding.level, finding.text) == ("ok", "median 1.0 GB/s and 50 us; slowest c -> d 900.0 MB/s 50 us")


def test_a_slow_link_and_a_slow_host() -> None:
    one = judged(*ring({(2, 3): 1e7}))
    assert one.level == "warn"
    assert one.text.startswith("slow: c -> d 10.0 MB/s 50 us (median")
    assert judged(*ring({(2, 3): 1e7, (2, 1): 1.1e7})).text.startswith("c is slow: c -> d 10.0 MB/s")
    assert judged(*ring({(2, 3): 1e7, (0, 1): 1.1e7})).text.startswith("slow: c -> d 10.0 MB/s")


def test_a_late_link() -> None:
    finding = judged(*ring({}, delays={(1, 2): 0.05}))
    assert finding.level == "warn"
    assert finding.text.startswith("slow: b -> c 1.0 GB/s 50.0 ms")


def test_links_inside_of_a_host_are_judged_apart() -> None:
    measured = [Link(0, 1, 5e9, 1e-5), Link(1, 2, 1e8, 1e-4), Link(2, 3, 5e9, 1e-5), Link(3, 0, 1e8, 1e-4)]
    found = links.judge(measured, host_of=[0, 0, 1, 1], names={0: "a", 1: "b"})
    assert [(f.check, f.level) for f in found] == [("links", "ok"), ("inside a host", "ok")]


def test_the_way_to_a_host() -> None:
    route = network.route_to("127.0.0.1")
    assert (route.is_here, route.address, route.interface) == (True, "127.0.0.1", "lo")
    with pytest.raises(UsageError, match="has no address here"):
        network.route_to("no-such-host.invalid")


def test_waiting_for_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        port, other = server.getsockname()[1], closed.getsockname()[1]
        closed.close()
        assert network.wait_for_port("127.0.0.1", [other, port], seconds=60) == port
    with pytest.raises(Interrupted, match="did not answer for 0 s"):
        network.wait_for_port("127.0.0.1", [port], seconds=0)


def test_the_guests_at_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server for IPv6 as well, as torchrun's is. Those of this host are none."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        assert network.guests(port) == []
        with socket.create_connection(("127.0.0.1", port)):
            assert network.guests(port) == []
            monkeypatch.setattr(network, "_is_ours", lambda address: False)
            assert network.guests(port) == ["127.0.0.1"]
