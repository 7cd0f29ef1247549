"""Hosts made of network namespaces. Each has a hostname, an address and a link to one bridge. Needs root."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

INTERFACE, SWITCH = "eth0", "br0"
_networks = itertools.count()


def reason_to_skip() -> str | None:
    """Return the reason why hosts cannot be made here, None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    trial = f"distgpt-{os.getpid()}-trial"
    try:
        made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
        subprocess.run(["ip", "netns", "del", trial], capture_output=True)
    except FileNotFoundError:
        return "needs the ip command of iproute2"
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else None


class Network:
    """Hosts n1, n2, ... at 10.77.0.1, 10.77.0.2, ... on one switch."""

    def __init__(self, count: int, directory: Path) -> None:
        self._name = f"distgpt-{os.getpid()}-{next(_networks)}"
        self.hosts = [f"n{number}" for number in range(1, count + 1)]
        self._names = directory / "hosts"
        self._slow_links: list[subprocess.Popen[str]] = []
        lines = [f"{self.address(host)} {host}" for host in self.hosts]
        self._names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))

    def address(self, host: str) -> str:
        return f"10.77.0.{host.removeprefix('n')}"

    def up(self) -> None:
        """Make the hosts and the switch."""
        _ip("netns", "add", self._space("switch"))
        self._on_switch("link", "add", SWITCH, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        self._on_switch("link", "set", SWITCH, "up")
        for host in self.hosts:
            _ip("netns", "add", self._space(host))
            self._on_switch(
                *("link", "add", host, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", self._space(host)),
            )
            _ip("-n", self._space(host), "link", "set", "lo", "up")
            self._plug_in(host)

    def _plug_in(self, host: str) -> None:
        """Attach the two ends of a host's link, one to the switch and one with the address to the host."""
        self._on_switch("link", "set", host, "mtu", "9000", "master", SWITCH, "up")
        inside = ("-n", self._space(host))
        _ip(*inside, "addr", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        _ip(*inside, "link", "set", INTERFACE, "mtu", "9000", "up")

    def down(self) -> None:
        """Kill the processes on the hosts, and remove the hosts."""
        for space in [*map(self._space, self.hosts), self._space("switch")]:
            for pid in _output("ip", "netns", "pids", space).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for slow_link in self._slow_links:
            slow_link.communicate()

    def command(self, host: str, *command: str) -> list[str]:
        """Return a command line that, started here, runs `command` on `host`."""
        script = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        space = f"--net=/run/netns/{self._space(host)}"
        shell = ["sh", "-c", script, "sh", host, str(self._names)]
        # One core each: ranks that all use every core would wait for each other.
        cores = sorted(os.sched_getaffinity(0))
        core = cores[self.hosts.index(host) % len(cores)]
        return ["taskset", "-c", str(core), "nsenter", space, "unshare", "--uts", "--mount", *shell, *command]

    def limit(self, host: str, rate: str) -> None:
        """Let the host send no faster than `rate`, like 100mbit."""
        space = self._space(host)
        subprocess.run(
            [
                *("tc", "-n", space, "qdisc", "add", "dev", INTERFACE, "root", "tbf"),
                *("rate", rate, "burst", "128kb", "latency", "100ms"),
            ],
            check=True,
        )

    def replace_link(self, host: str, *, megabits: float, round_trip: float) -> None:
        """Give the host an unused link of so many Mbit/s each way and a round trip of so many seconds."""
        self._on_switch("link", "del", host)
        ends = (self._space("switch"), host, self._space(host), INTERFACE)
        rate_and_delay = (str(megabits * 1e6 / 8), str(round_trip / 2))
        command = [sys.executable, str(Path(__file__).with_name("slow_link.py")), *ends, *rate_and_delay]
        slow_link = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._slow_links.append(slow_link)
        assert slow_link.stdout is not None
        assert slow_link.stdout.readline() == "up\n"
        self._plug_in(host)

    def cut(self, host: str) -> None:
        """Drop every packet from and to the host. Neither side gets an error, as when a switch fails."""
        self._on_switch("link", "set", host, "nomaster")

    def heal(self, host: str) -> None:
        """Undo `cut`."""
        self._on_switch("link", "set", host, "master", SWITCH)

    def bytes_through(self, host: str) -> int:
        """Return the bytes that have crossed the host's port of the switch, both ways."""
        path = f"/sys/class/net/{host}/statistics"
        command = ["ip", "netns", "exec", self._space("switch"), "cat", f"{path}/rx_bytes", f"{path}/tx_bytes"]
        return sum(map(int, _output(*command).split()))

    def isolate(self, *hosts: str) -> None:
        """Let these hosts reach all others, but not each other."""
        for host in hosts:
            self._on_switch("link", "set", host, "type", "bridge_slave", "isolated", "on")

    def ranks(self, host: str) -> list[int]:
        """Return the process ids of the ranks that run on the host."""
        found = []
        for pid in _output("ip", "netns", "pids", self._space(host)).split():
            with suppress(OSError):
                if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(int(pid))
        return found

    def _space(self, host: str) -> str:
        return f"{self._name}-{host}"

    def _on_switch(self, *arguments: str) -> None:
        _ip("-n", self._space("switch"), *arguments)


@contextmanager
def network(count: int, directory: Path) -> Iterator[Network]:
    """Make so many hosts, and remove them at the end."""
    made = Network(count, directory)
    try:
        made.up()
        yield made
    finally:
        made.down()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout
