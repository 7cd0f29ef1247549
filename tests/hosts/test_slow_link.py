"""Two hosts with a slow link of long latency: 100 Mbit/s, and a round trip of 50 ms."""

import re
from pathlib import Path

import pytest

from tests import jobs
from tests.hosts.conftest import MakeNetwork
from tests.hosts.launching import multinode
from tests.hosts.test_multinode import SHAPE, finish

SHORT = (*SHAPE, "--train.steps=20", "--eval.every=10", "--checkpoint.every=10")


def test_two_hosts_with_a_slow_link_train_as_one_process(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path
) -> None:
    alone = jobs.command("train", *SHORT, f"--data.path={prepared}", f"--run.dir={tmp_path / 'one'}")
    assert alone.code == 0, alone
    hosts = make_network(2)
    hosts.replace_link("n2", megabits=100, round_trip=0.05)
    endings = finish(multinode(hosts, [*SHORT, f"--data.path={prepared}", f"--run.dir={tmp_path / 'two'}"]))
    for ended in endings.values():
        assert ended.code == 0, ended
    for read in (jobs.losses, jobs.val_losses):
        assert read(tmp_path / "two") == pytest.approx(read(tmp_path / "one"), abs=1e-4)
    said = "".join(ended.stdout for ended in endings.values())
    (links,) = re.findall(r"^\w+ +links +(.*)$", said, re.MULTILINE)
    rates = [float(rate) for rate in re.findall(r"([\d.]+) MB/s", links)]
    assert rates
    assert all(rate < 13 for rate in rates), links  # 100 Mbit/s is 12.5 MB/s
