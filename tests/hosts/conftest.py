"""Fixtures: hosts made of network namespaces."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import jobs
from tests.hosts.network import Network, network, reason_to_skip

MakeNetwork = Callable[[int], Network]


@pytest.fixture(scope="session")
def installed() -> None:
    """Install what launch/*.sh need, since the hosts of the tests reach no package index."""
    subprocess.run(["bash", "-c", '. "$0"; environment', jobs.PROJECT / "launch" / "environment.sh"], check=True)


@pytest.fixture
def make_network(installed: None, tmp_path: Path) -> Iterator[MakeNetwork]:
    """A function that makes so many hosts. They are removed after the test, which is skipped if none can be made."""
    if reason := reason_to_skip():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(network(count, tmp_path))
