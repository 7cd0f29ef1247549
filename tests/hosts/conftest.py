"""Hosts made of network namespaces, where they can be made."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import jobs
from tests.hosts.network import Network, network, why_not

MakeNetwork = Callable[[int], Network]


@pytest.fixture(scope="session")
def installed() -> None:
    """What launch/*.sh would otherwise install from a host that reaches no package index."""
    subprocess.run(["bash", "-c", '. "$0"; environment', jobs.PROJECT / "launch" / "environment.sh"], check=True)


@pytest.fixture
def make_network(installed: None, tmp_path: Path) -> Iterator[MakeNetwork]:
    """Makes so many hosts; they are gone after the test."""
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(network(count, tmp_path))
