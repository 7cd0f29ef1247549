"""Train on several hosts without a scheduler, and through their failures: launch/multinode.sh. Imports no torch."""

import math
import os
import re
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from distgpt.config import Config, resolve
from distgpt.errors import EXIT_INTERRUPTED, EXIT_OK, UsageError
from distgpt.launch.agent import Supervisor
from distgpt.launch.policy import Ending, Tries, can_retry, say, say_end
from distgpt.launch.settings import SIGNALS, TORCHRUN, count_from_environment, torchrun_environment
from distgpt.machine import default_ranks
from distgpt.preflight import network
from distgpt.run.exit_report import read_report
from distgpt.run.paths import RunPaths

# What an attempt has torchrun start, one after the other.
PREFLIGHT: tuple[str, ...] = ("distgpt.doctor", "--distributed")
TRAIN: tuple[str, ...] = ("distgpt.train",)
LONGEST_PAUSE = 5.0
# Hosts that have met wait so many seconds for more of them.
LAST_CALL = {PREFLIGHT: 10, TRAIN: 3}
# Beyond JOIN_SECONDS, hosts may just have met, and wait for more.
MEETING_SECONDS = 15


@dataclass(frozen=True)
class Hosts:
    """The hosts of the job, by HEAD and NODES, and what each of them does."""

    head: str
    port: int  # of training; the next one is the preflight's
    least: int
    most: int
    ranks: int
    join_seconds: int
    tries: int


def main(arguments: list[str]) -> int:
    """Train until the run is done or cannot go on; return its exit code, which torchrun would flatten to 1."""
    config = resolve(arguments, os.environ)
    hosts = read_hosts(config)
    # Told explicitly, since guessing from the hostname goes wrong where names are shared, missing or mean 127.0.1.1.
    route = network.route_to(hosts.head)
    if route.is_here:
        require_free_ports(hosts, route.address)
    with tempfile.TemporaryDirectory(prefix="distgpt-", ignore_cleanup_errors=True) as scratch:
        return Launcher(config, hosts, route, Path(scratch), arguments).run()


def read_hosts(config: Config) -> Hosts:
    """Return what the environment says. Raises UsageError."""
    ranks, join_seconds, tries = (count_from_environment(name) for name in ("NPROC_PER_NODE", "JOIN_SECONDS", "TRIES"))
    head, nodes = os.environ.get("HEAD", ""), os.environ.get("NODES", "")
    place = re.fullmatch("([^:]+):([1-9][0-9]{0,4})", head)
    if not place or int(place[2]) > 65534:
        raise UsageError(f"HEAD={head} must be host:port: one of the hosts, and a free port on it from 1 to 65534")
    numbers = re.fullmatch("([1-9][0-9]{0,4})(?::([1-9][0-9]{0,4}))?", nodes)
    if not numbers:
        raise UsageError(f"NODES={nodes} must say how many hosts there are: NODES=4 or NODES=3:4")
    least, most = int(numbers[1]), int(numbers[2] or numbers[1])
    if not least <= most < 2 * least:  # a cut network must not leave two groups that both go on
        raise UsageError(
            f"NODES={nodes}: the smaller number must be more than half of the larger one, so that only one side goes "
            "on when the network is cut"
        )
    if config.parallel.strategy == "diloco" and least < most:
        raise UsageError(f"NODES={nodes}: diloco keeps the number of its replicas, write NODES={most}")
    hosts = Hosts(place[1], int(place[2]), least, most, ranks or default_ranks(), join_seconds or 600, tries or 10)
    batch, micro_batch, sizes = config.train.global_batch, max(1, config.train.micro_batch), range(least, most + 1)
    for size in sizes:
        if batch % (size * hosts.ranks * micro_batch):
            step = math.lcm(*sizes) * hosts.ranks * micro_batch
            raise UsageError(
                f"train.global_batch {batch} does not divide over {size} hosts x {hosts.ranks} ranks x "
                f"train.micro_batch {micro_batch}: take a multiple of {step}, which divides for NODES={nodes}"
            )
    return hosts


def require_free_ports(hosts: Hosts, address: str) -> None:
    """Raise UsageError if a port is taken: two jobs at one rendezvous would wait for each other's hosts silently."""
    for port in (hosts.port, hosts.port + 1):
        if network.connection_error(address, port, timeout=2) is None:
            raise UsageError(
                f"port {port} of {hosts.head} is taken, by another job or one that still ends: choose another in HEAD "
                "(its port and the next one are used)"
            )


class Launcher:
    """This host's part in the job, attempt after attempt."""

    def __init__(self, config: Config, hosts: Hosts, route: network.Route, scratch: Path, arguments: list[str]) -> None:
        self._run_dir, self._hosts, self._route, self._scratch = config.run_dir, hosts, route, scratch
        self._shared_report = RunPaths(config.run_dir).exit_report
        self._tries = Tries(hosts.tries, config.run_dir)
        # What comes from here on is this job's own.
        self._arguments = arguments if self._tries.newest else [*arguments, "--run.fresh=false"]
        self._supervisor = Supervisor(timeout=config.health.timeout)
        self._phase = PREFLIGHT
        self._attempts = 0

    @property
    def _port(self) -> int:
        """The port at which the hosts meet in this phase."""
        return self._hosts.port + (self._phase == PREFLIGHT)

    def run(self) -> int:
        """Start again until the run is done, or until nothing is gained by that; return the exit code."""
        while not self._supervisor.signalled:
            self._attempts += 1
            if not self._route.is_here:
                self._join_phase_of_head()
            ending = self._attempt()
            if ending is None and self._phase == TRAIN:
                return EXIT_OK
            if ending is None:
                self._phase = TRAIN
            elif (code := self._code_after(ending)) is not None:
                return code
        return EXIT_INTERRUPTED

    def _join_phase_of_head(self) -> None:
        """Wait until the head has a phase under way, which it decides for all hosts.

        A host that comes late, or back, finds training under way and joins it, and a head that was restarted finds the
        others ready to go through the preflight with it.
        """
        hosts = self._hosts
        ports = [hosts.port] if self._phase == TRAIN else [hosts.port, hosts.port + 1]
        with self._supervisor.waiting():
            open_port = network.wait_for_port(hosts.head, ports, seconds=hosts.join_seconds)
        self._phase = TRAIN if open_port == hosts.port else PREFLIGHT

    def _attempt(self) -> Ending | None:
        """Run one torchrun on this host to its end; return how it failed, None if it did not."""
        report, before = self._scratch / f"exit-{self._attempts}.json", read_report(self._shared_report)
        env = torchrun_environment(report, shutdown_seconds=120, interface=self._route.interface)
        if self._supervisor.run(self._command(), env, while_waiting=self._require_hosts_in_time) == 0:
            return None
        found, shared = read_report(report), read_report(self._shared_report)
        if (found is None or found["code"] == EXIT_INTERRUPTED) and shared and shared != before:
            # Other hosts than the one with the trouble, or than the first to leave when all is done, only see that it
            # is gone. The run's own report, if it is new, says why.
            found = found if shared["code"] == EXIT_INTERRUPTED else shared
        return Ending.from_report(found, otherwise="")

    def _command(self) -> list[str]:
        """Return the command line of torchrun.

        Hosts find each other by their run directory: one of another job waits for its own, and leaves the others
        alone. Every attempt has a store of its own, which ends with the head's torchrun, and no restart inside of it:
        after a network failure such a restart would wait for agents that cannot hear each other.
        """
        hosts, is_head = self._hosts, int(self._route.is_here)
        join_timeout = 2 * hosts.join_seconds + 600
        return [
            *(*TORCHRUN, f"--nnodes={hosts.least}:{hosts.most}", f"--nproc_per_node={hosts.ranks}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={hosts.head}:{self._port}"),
            *(f"--rdzv-id={zlib.crc32(str(self._run_dir).encode())}", f"--local-addr={self._route.address}"),
            f"--rdzv-conf=is_host={is_head},join_timeout={join_timeout},last_call_timeout={LAST_CALL[self._phase]}",
            *("--max-restarts=0", "--monitor-interval=0.1", SIGNALS, "-m", *self._phase, *self._arguments),
        ]

    def _require_hosts_in_time(self, seconds: float) -> None:
        """End this launcher if the hosts did not meet in time, and say which are missing.

        torchrun has a longer limit, and ends with a traceback that does not say how many hosts are missing.
        """
        hosts, limit = self._hosts, self._hosts.join_seconds
        if hosts.least == 1 or seconds < limit:
            return
        came = network.guests(self._port) if self._route.is_here else []
        if self._route.is_here and len(came) + 1 < hosts.least:
            listed = ", ".join(["this one", *came])
            say(
                f"{len(came) + 1} of {hosts.least} hosts came within {limit} s ({listed}): start the same command on "
                "the missing ones"
            )
        elif seconds >= limit + MEETING_SECONDS:
            say(
                f"{hosts.least} hosts did not meet at {hosts.head} within {limit} s: do all of them have the same "
                "run.dir and NODES?"
            )
        else:
            return
        sys.exit(EXIT_INTERRUPTED)

    def _code_after(self, ending: Ending) -> int | None:
        """Say how an attempt ended; return the exit code of the job, None if it starts again."""
        stopped_by = self._supervisor.signalled
        if stopped_by and ending.code != EXIT_OK:
            say(f"stopped by {stopped_by.name} on this host{ending.cause and f': {ending.cause}'}")
            return EXIT_INTERRUPTED
        # Later, ranks of ours that are cut off hold the run directory.
        if not can_retry(ending.code, lock_may_be_ours=self._attempts > 2):
            assert ending.code is not None
            say_end(ending.code, ending.cause)
            return ending.code
        cause, exhausted = ending.cause_without_advice or "no rank could say why, see above", self._tries.exhausted()
        if exhausted:
            say(f"gave up after {self._tries.limit} attempts without a new checkpoint: {cause}; run it again to go on")
            return EXIT_INTERRUPTED
        if not self._route.is_here:
            self._phase = PREFLIGHT
        say(f"{cause}; starting again (attempt {self._attempts + 1})")
        with self._supervisor.waiting():
            time.sleep(min(max(self._tries.count, 1), LONGEST_PAUSE))
        return None
