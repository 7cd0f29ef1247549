"""bench/scaling.py: training sends as many bytes as the formulas give."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import jobs
from tests.hosts.network import INTERFACE, network, reason_to_skip


@pytest.fixture(autouse=True)
def fork_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start torchrun as a fork of a process that has already imported torch."""
    for name, value in jobs.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling", jobs.PROJECT / "bench" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module  # dataclasses need the module there
    spec.loader.exec_module(module)
    return module


def test_the_formulas_agree_in_special_cases(scaling: ModuleType) -> None:
    blocks, root = 300, 100
    whole = scaling.Job("fsdp", 4, 16, 2, 1)
    one_group = scaling.Job("hsdp", 4, 16, 2, 1, shard=4)
    assert scaling.expected_bytes(one_group, blocks, root) == scaling.expected_bytes(whole, blocks, root)
    groups_of_one = scaling.Job("hsdp", 4, 16, 2, 1, shard=1)
    replicas = scaling.expected_bytes(scaling.Job("ddp", 4, 16, 2, 1), blocks, root)
    assert scaling.expected_bytes(groups_of_one, blocks, root) == replicas == 2 * 3 * 400
    # With one rank on each of two hosts, all bytes cross the link.
    pair = scaling.Job("fsdp", 2, 8, 2, 1)
    assert scaling.expected_between_two_hosts(pair, blocks, root) == scaling.expected_bytes(pair, blocks, root)


@pytest.mark.skipif(reason_to_skip() is not None, reason="needs a separate loopback device, and so root")
@pytest.mark.parametrize(("strategy", "micro_batches"), [("ddp", 2), ("fsdp", 2)])
def test_bytes_on_the_wire_equal_the_formulas(scaling: ModuleType, strategy: str, micro_batches: int) -> None:
    job = scaling.Job(strategy, 2, 2 * 2 * micro_batches, 2, steps=3)
    measured = scaling.run(job)
    assert measured.wire_bytes == pytest.approx(scaling.expected_bytes(job, measured.blocks, measured.root), rel=0.03)


@pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))
def test_hsdp_and_diloco_send_less_between_hosts(scaling: ModuleType, tmp_path: Path) -> None:
    """Two hosts of two ranks: the bytes over the bridge between them. DiLoCo sends weights now and then, even less."""
    sent = {}
    with network(2, tmp_path) as hosts:
        for strategy, more in scaling.BETWEEN_HOSTS.items():
            job = scaling.Job(strategy, 4, 8, 2, steps=5, interface=INTERFACE, **more)
            measured = scaling.run_on(hosts, job)
            expected = scaling.expected_between_two_hosts(job, measured.blocks, measured.root)
            assert measured.wire_bytes == pytest.approx(expected, rel=0.05)
            sent[strategy] = measured.wire_bytes
    assert sent["hsdp"] < sent["fsdp"] / 2
    assert sent["diloco"] < sent["hsdp"] / 4
