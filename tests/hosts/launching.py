"""Start launch/multinode.sh on hosts that are network namespaces."""

import time
from collections.abc import Sequence

from tests import jobs
from tests.hosts.network import Network

STEP = "| loss "


class HostJob(jobs.Job):
    """A job that can be read slowly, so that it waits to print and does not end before something else has happened."""

    def read_slowly_until(self, text: str, *, times: int = 1) -> None:
        """Read its stdout, about four steps a second, until `text` has appeared so many times.

        A pipe that is full takes nothing before it is empty. That takes ten seconds, less than SHORT_TIMEOUTS.
        """
        while self._output.count(text.encode()) < times:
            assert self._read(), f"the job ended before it printed {text!r}\n{self.finish()}"
            time.sleep(0.15)

    def read_two_steps(self) -> None:
        """Read slowly until it has printed two more steps, so that it is not starting any more."""
        self.read_slowly_until(STEP, times=self._output.count(STEP.encode()) + 2)


def multinode(
    hosts: Network,
    arguments: Sequence[str],
    *,
    nodes: str = "",
    head: str = "n1",
    on: Sequence[str] = (),
    **variables: str,
) -> dict[str, HostJob]:
    """Start launch/multinode.sh with one rank on every host, or on those of `on`."""
    settings = {
        "HEAD": f"{head}:29400",
        "NODES": nodes or str(len(hosts.hosts)),
        "NPROC_PER_NODE": "1",
        "JOIN_SECONDS": "600",
        **variables,
    }
    script = str(jobs.PROJECT / "launch" / "multinode.sh")
    return {host: HostJob(hosts.command(host, script, *arguments), **settings) for host in on or hosts.hosts}
