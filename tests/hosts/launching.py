"""Start launch/multinode.sh on hosts that are network namespaces."""

from collections.abc import Sequence

from tests import jobs
from tests.hosts.network import Network

STEP = "| loss "
# For PYTHONPATH: a job is slow while there is a file `slow` in its run directory.
SLOW = f"{jobs.PROJECT / 'tests' / 'hosts' / 'slow'}:{jobs.FORKED}"


class HostJob(jobs.Job):
    """A job on one host, whose stdout is read for what appears again and again."""

    def read_until(self, text: str) -> None:
        """Read its stdout until `text` has appeared."""
        self._read_until(text, 1)

    def read_until_again(self, text: str) -> None:
        """Read its stdout until `text` appears once more than in what has been read."""
        self._read_until(text, self._output.count(text.encode()) + 1)

    def read_two_steps(self) -> None:
        """Read until it has printed two more steps, so that it is not starting any more."""
        self._read_until(STEP, self._output.count(STEP.encode()) + 2)

    def _read_until(self, text: str, times: int) -> None:
        while self._output.count(text.encode()) < times:
            assert self._read(), f"the job ended before it printed {text!r}\n{self.finish()}"


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
    return {
        # Rank 0, which prints the steps, is on the host with the lowest address. Tests read no other until the end.
        host: HostJob(hosts.command(host, script, *arguments), one_line=host == "n1", **settings)
        for host in on or hosts.hosts
    }
