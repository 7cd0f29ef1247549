"""The preflight's checks of one machine, and the parts of the other checks that need no second process."""

import dataclasses
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distgpt.config import Config, resolve
from distgpt.corpus.order import Order
from distgpt.corpus.shards import Dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DirectoryError, Interrupted, StorageError, UsageError
from distgpt.model.gpt import count_parameters
from distgpt.preflight import equality, hosts, links, machine, network
from distgpt.preflight.finding import Finding
from distgpt.preflight.links import Link
from distgpt.run import lock
from distgpt.run.lock import RunLock, lock_holder
from distgpt.run.paths import RunPaths
from tests.checkpoint.checkpoints import SMALL, trainee

ONE_PROCESS = Runtime(0, 0, 1, 1, torch.device("cpu"))


def config(*arguments: str) -> Config:
    return resolve([*arguments, "--model.block_size=16"], {})


def set_free_disk(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size))


def test_too_little_disk_space_warns_or_fails(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(f"--run.dir={tmp_path / 'run'}", "--checkpoint.keep=3")
    one = 12 * count_parameters(wanted.model, dataset.vocab_size)
    set_free_disk(monkeypatch, 6 * one)
    assert machine.check_disk(wanted, ONE_PROCESS, dataset).level == "ok"
    set_free_disk(monkeypatch, 4 * one)
    finding = machine.check_disk(wanted, ONE_PROCESS, dataset)
    assert finding.level == "warn"
    assert "up to 5 are kept" in finding.text
    set_free_disk(monkeypatch, one // 2)
    with pytest.raises(StorageError, match="MiB free and a checkpoint takes"):
        machine.check_disk(wanted, ONE_PROCESS, dataset)


def test_existing_checkpoints_need_no_more_space(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(f"--run.dir={tmp_path}", "--checkpoint.keep=3")
    for step in range(4):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
    set_free_disk(monkeypatch, 2 * 12 * count_parameters(wanted.model, dataset.vocab_size))
    assert machine.check_disk(wanted, ONE_PROCESS, dataset).level == "ok"


def test_the_data_type_is_that_of_the_run_that_goes_on(dataset: Dataset, tmp_path: Path) -> None:
    wanted = resolve([*SMALL, f"--data.path={dataset.path}", f"--run.dir={tmp_path}"], {})
    for dtype in ("float32", "bfloat16"):
        subject = trainee(tmp_path, dataset, f"--train.dtype={dtype}")
        subject.learn()
        subject.checkpointer.save(len(dtype), val_loss=None)
        subject.checkpointer.require_saved(len(dtype))
        findings = {finding.check: finding for finding in machine.check_machine(wanted, ONE_PROCESS, thorough=False)}
        assert findings["devices"].text.endswith(dtype)
        assert findings["run directory"].text.endswith(f"resumes from step-0000000{len(dtype)}")


def test_too_little_memory_warns_or_fails(
    dataset: Dataset, one_process: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config()
    need = 28 * count_parameters(wanted.model, dataset.vocab_size)
    for available, level in ((2 * need, "ok"), (1.2 * need, "warn")):
        monkeypatch.setattr(machine, "free_memory", partial(float, available))
        assert machine.check_memory(wanted, one_process, dataset).level == level
    monkeypatch.setattr(machine, "free_memory", lambda: 0.9 * need)
    with pytest.raises(UsageError, match="without activations: shard over more ranks"):
        machine.check_memory(wanted, one_process, dataset)


@pytest.mark.parametrize(("strategy", "shards"), [("ddp", 1), ("fsdp", 4), ("hsdp", 2)])
def test_memory_is_divided_by_the_number_of_shards(
    strategy: str, shards: int, dataset: Dataset, one_process: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(f"--parallel.strategy={strategy}")
    runtime = dataclasses.replace(one_process, world_size=4, local_world_size=2)
    need = 28 * count_parameters(wanted.model, dataset.vocab_size) / shards
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * need * 1.01)
    assert machine.check_memory(wanted, runtime, dataset).level == "warn"
    monkeypatch.setattr(machine, "free_memory", lambda: 2 * need * 0.99)
    with pytest.raises(UsageError, match=strategy):
        machine.check_memory(wanted, runtime, dataset)


def test_too_little_shared_memory_warns(one_process: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_disk(monkeypatch, 2**20)
    finding = machine.check_shared_memory(one_process)
    assert finding.level == "warn"
    assert "--shm-size" in finding.text


def test_windows_are_counted_as_in_training(dataset: Dataset) -> None:
    wanted = config("--train.steps=3", "--train.global_batch=8", "--eval.sequences=5")
    drawn = Order([len(shard) for shard in dataset.train.shards], block_size=16, seed=0).windows
    assert machine.check_windows(wanted, dataset).text == (
        f"{drawn:,} of 16 tokens for training, 5 for evaluation; 3 steps read the training text {24 / drawn:.3g} times"
    )


def test_more_than_ten_epochs_warn(dataset: Dataset) -> None:
    windows = Order([len(shard) for shard in dataset.train.shards], block_size=16, seed=0).windows
    enough = 10 * windows // 8
    assert machine.check_windows(config(f"--train.steps={enough}", "--train.global_batch=8"), dataset).level == "ok"
    finding = machine.check_windows(config("--train.steps=572000", "--train.global_batch=8"), dataset)
    assert finding.level == "warn"
    assert f"read the training text {572000 * 8 / windows:,.0f} times" in finding.text
    assert f"with --train.steps={enough}" in finding.text


def test_the_check_leaves_no_file_in_the_run_directory(dataset: Dataset, tmp_path: Path) -> None:
    finding = machine.check_run_directory(config(f"--run.dir={tmp_path / 'a' / 'b'}"), ONE_PROCESS, dataset)
    assert (finding.level, list(tmp_path.iterdir())) == ("ok", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match="is not a directory"):
        machine.check_run_directory(config(f"--run.dir={tmp_path / 'file' / 'run'}"), ONE_PROCESS, dataset)


def test_a_locked_run_directory_names_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LEASE", 0.5)  # the seconds for which lock_holder watches a living owner
    paths = RunPaths(tmp_path)
    assert lock_holder(paths) is None
    assert list(tmp_path.iterdir()) == []
    held = RunLock(paths)
    assert (lock_holder(paths) or "").startswith(f"pid {os.getpid()} on ")
    with pytest.raises(DirectoryError, match="in use by pid"):
        machine.check_run_directory(config(f"--run.dir={tmp_path}"), ONE_PROCESS, None)  # type: ignore[arg-type]
    held.release()
    assert lock_holder(paths) is None


def test_check_equal_names_the_hosts_that_differ() -> None:
    def text(**values: str) -> str:
        return equality.check_equal("torch", values, fix="do this", code=2).text

    assert equality.check_equal("torch", {"a": "1", "b": "1"}, fix="", code=2).level == "ok"
    assert text(a="1", b="2") == "a has 1, b has 2: do this"
    assert text(a="1", b="2", c="1") == "b has 2, the other 2 have 1: do this"
    assert text(a="1", b="2", c="1", d="3", e="1") == "b has 2, d has 3, the other 3 have 1: do this"


def test_different_clocks_warn() -> None:
    assert hosts.check_clocks({"a": 0.0, "b": 0.4, "c": -0.5}).level == "ok"
    finding = hosts.check_clocks({"a": 0.0, "b": 0.4, "c": -0.7})
    assert finding.level == "warn"
    assert finding.text.startswith("the clocks of 3 hosts differ by up to 1.100 s: b is ahead of c")


def test_hosts_with_the_same_name_get_their_address_as_label() -> None:
    reports = [
        equality.HostReport(name, f"10.0.0.{i}", 1, [], {}, {}) for i, name in enumerate(["node", "other", "node"])
    ]
    assert equality.host_labels(reports) == ["node (10.0.0.0)", "other", "node (10.0.0.2)"]


def test_hashes_are_stable_and_differ_with_the_data(dataset: Dataset, other_dataset: Dataset) -> None:
    assert equality.package_hash() == equality.package_hash()
    assert equality.sample_hash(dataset.train) == equality.sample_hash(dataset.train)
    assert equality.sample_hash(dataset.train) != equality.sample_hash(other_dataset.train)


def ring(slow: dict[tuple[int, int], float]) -> Iterator[Link]:
    """Links of 4 ranks on 4 hosts in both directions, 1 GB/s each but for those in `slow`."""
    for first in range(4):
        for ends in ((first, (first + 1) % 4), ((first + 1) % 4, first)):
            yield Link(*ends, slow.get(ends, 1e9))


def link_finding(*measured: Link) -> Finding:
    (finding,) = links.check_links(measured, host_of=[0, 1, 2, 3], names=["a", "b", "c", "d"])
    return finding


def test_equal_links_pass() -> None:
    finding = link_finding(*ring({(2, 3): 0.9e9}))
    assert (finding.level, finding.text) == ("ok", "median 1.0 GB/s; slowest c -> d 900.0 MB/s")


def test_a_slow_link_or_host_is_named() -> None:
    finding = link_finding(*ring({(2, 3): 1e7}))
    assert finding.level == "warn"
    assert finding.text.startswith("slow: c -> d 10.0 MB/s (median 1.0 GB/s): ")
    assert link_finding(*ring({(2, 3): 1e7, (2, 1): 1.1e7})).text.startswith("c is slow: c -> d 10.0 MB/s, c -> b 11.0")
    assert link_finding(*ring({(2, 3): 1e7, (0, 1): 1.1e7})).text.startswith("slow: c -> d 10.0 MB/s, a -> b 11.0")


def test_links_within_a_host_are_compared_with_each_other_only() -> None:
    measured = [Link(0, 1, 5e9), Link(1, 2, 1e8), Link(2, 3, 5e9), Link(3, 0, 1e8)]
    findings = links.check_links(measured, host_of=[0, 0, 1, 1], names=["a", "b"])
    assert [(f.check, f.level) for f in findings] == [("links", "ok"), ("inside a host", "ok")]


def test_the_route_to_a_host() -> None:
    route = network.route_to("127.0.0.1")
    assert (route.is_here, route.address, route.interface) == (True, "127.0.0.1", "lo")
    with pytest.raises(UsageError, match="cannot resolve no-such-host"):
        network.route_to("no-such-host.invalid")


def test_wait_for_port_returns_the_first_open_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        port, other = server.getsockname()[1], closed.getsockname()[1]
        closed.close()
        assert network.wait_for_port("127.0.0.1", [other, port], seconds=60) == port
    with pytest.raises(Interrupted, match="did not answer for 0 s"):
        network.wait_for_port("127.0.0.1", [port], seconds=0)


def test_connected_hosts_leaves_out_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server also accepts IPv6, as torchrun's does. Connections from this host do not count."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        assert network.connected_hosts(port) == []
        with socket.create_connection(("127.0.0.1", port)):
            assert network.connected_hosts(port) == []
            monkeypatch.setattr(network, "is_own_address", lambda address: False)
            assert network.connected_hosts(port) == ["127.0.0.1"]
