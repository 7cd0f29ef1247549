"""Start launch/multinode.sh on hosts that are network namespaces."""

import time
from collections.abc import Sequence

from tests import jobs
from tests.hosts.network import Network


class HostJob(jobs.Job):
    """A job that can be read slowly, so that it waits to print and does not end before something else has happened."""

    def read_slowly_until(self, text: str, *, times: int = 1) -> None:
        """Read its stdout, about four steps a second, until `text` has appeared so many times.

        A full pipe is empty after ten seconds, and takes nothing before: the job waits no longer for it than SHORT_TIMEOUTS.
        """
        while self._output.count(text.encode()) < times:
            assert self._read(), f"the job ended before it printed {text!r}\n{self.finish()}"
            time.sleep(0.15)


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
