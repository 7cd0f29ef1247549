"""Train on several hosts without a scheduler, and start again when one fails: launch/multinode.sh. Imports no torch."""

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
from distgpt.launch.settings import (
    SIGNALS_OPTION,
    TORCHRUN,
    count_from_environment,
    numa_options,
    torchrun_environment,
)
from distgpt.machine import default_ranks
from distgpt.preflight import network
from distgpt.run.exit_report import read_report
from distgpt.run.paths import RunPaths

# The two phases of a job, each a module that torchrun runs on all hosts.
PREFLIGHT: tuple[str, ...] = ("distgpt.doctor", "--distributed")
TRAIN: tuple[str, ...] = ("distgpt.train",)
MAX_PAUSE_SECONDS = 5.0
# Once the smallest number of hosts has met, torchrun waits this many seconds for more of them: for a host that comes
# later, it stops all ranks and starts them again.
LAST_CALL_SECONDS = 10
# After JOIN_SECONDS, hosts that have just met get this much time to wait for more of them and to start their ranks.
MEETING_SECONDS = LAST_CALL_SECONDS + 15


@dataclass(frozen=True)
class JobSettings:
    """The settings of the job, from the environment. `port`: that of training; the next one is the preflight's.

    `ranks`: the ranks on each host. `numa_options`: those of torchrun, for this host.
    """

    head: str
    port: int
    min_hosts: int
    max_hosts: int
    ranks: int
    numa_options: list[str]
    join_seconds: int
    tries: int


def main(arguments: list[str]) -> int:
    """Train until the run is done or cannot go on; return its exit code, which torchrun would turn into 1."""
    config = resolve(arguments, os.environ)
    settings = read_settings(config)
    # torchrun would guess from hostnames whether this host is the head, and several hosts may share a name.
    route = network.route_to(settings.head)
    if route.is_here:
        require_free_ports(settings, route.address)
    with tempfile.TemporaryDirectory(prefix="distgpt-", ignore_cleanup_errors=True) as scratch:
        return Launcher(config, settings, route, Path(scratch), arguments).run()


def read_settings(config: Config) -> JobSettings:
    """Read the settings from the environment. Raises UsageError."""
    ranks, join_seconds, tries = (count_from_environment(name) for name in ("NPROC_PER_NODE", "JOIN_SECONDS", "TRIES"))
    head, nodes = os.environ.get("HEAD", ""), os.environ.get("NODES", "")
    host_and_port = re.fullmatch("([^:]+):([1-9][0-9]{0,4})", head)
    if not host_and_port or int(host_and_port[2]) > 65534:
        raise UsageError(f"HEAD={head} must be host:port: one of the hosts, and a free port on it from 1 to 65534")
    numbers = re.fullmatch("([1-9][0-9]{0,4})(?::([1-9][0-9]{0,4}))?", nodes)
    if not numbers:
        raise UsageError(f"NODES={nodes} must say how many hosts there are: NODES=4 or NODES=3:4")
    min_hosts, max_hosts = int(numbers[1]), int(numbers[2] or numbers[1])
    if not min_hosts <= max_hosts < 2 * min_hosts:  # the two sides of a cut network must not both go on
        raise UsageError(
            f"NODES={nodes}: the smaller number must be more than half of the larger one, so that only one side goes "
            "on when the network is cut"
        )
    if config.parallel.strategy == "diloco" and min_hosts < max_hosts:
        raise UsageError(f"NODES={nodes}: diloco cannot change the number of its replicas, write NODES={max_hosts}")
    ranks = ranks or default_ranks(config.train.device)
    settings = JobSettings(
        head=host_and_port[1],
        port=int(host_and_port[2]),
        min_hosts=min_hosts,
        max_hosts=max_hosts,
        ranks=ranks,
        numa_options=numa_options(ranks),
        join_seconds=join_seconds or 600,
        tries=tries or 10,
    )
    require_batch_divides(config, settings, nodes)
    return settings


def require_batch_divides(config: Config, settings: JobSettings, nodes: str) -> None:
    """Raise UsageError unless the global batch divides over every number of hosts that `nodes` (NODES) allows."""
    batch, micro_batch, ranks = config.train.global_batch, max(1, config.train.micro_batch), settings.ranks
    counts = range(settings.min_hosts, settings.max_hosts + 1)
    for count in counts:
        if batch % (count * ranks * micro_batch):
            divisor = math.lcm(*counts) * ranks * micro_batch
            raise UsageError(
                f"train.global_batch {batch} does not divide over {count} hosts x {ranks} ranks x "
                f"train.micro_batch {micro_batch}: take a multiple of {divisor}, which divides for NODES={nodes}"
            )


def require_free_ports(settings: JobSettings, address: str) -> None:
    """Raise UsageError if a port is taken: the hosts of two jobs would silently wait for each other at it."""
    for port in (settings.port, settings.port + 1):
        if network.connection_error(address, port, timeout=2) is None:
            raise UsageError(
                f"port {port} of {settings.head} is taken, by another job or one that is still ending: choose another "
                "in HEAD (its port and the next one are used)"
            )


class Launcher:
    """Runs torchrun on this host, attempt after attempt, until the job ends."""

    def __init__(
        self, config: Config, settings: JobSettings, route: network.Route, scratch: Path, arguments: list[str]
    ) -> None:
        self._run_dir, self._settings, self._route, self._scratch = config.run_dir, settings, route, scratch
        self._shared_report = RunPaths(config.run_dir).exit_report
        self._tries = Tries(settings.tries, config.run_dir)
        # Checkpoints that a restart finds are this job's own.
        self._arguments = arguments if self._tries.newest else [*arguments, "--run.fresh=false"]
        self._supervisor = Supervisor(timeout=config.health.timeout)
        self._phase = PREFLIGHT
        self._attempts = 0

    @property
    def _port(self) -> int:
        """The port of the rendezvous in this phase."""
        return self._settings.port + (self._phase == PREFLIGHT)

    def run(self) -> int:
        """Start again until the run is done, or a restart cannot help; return the exit code."""
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
        """Wait until the head listens on a port, and enter its phase: the head decides the phase for all hosts.

        So a host that comes late, or back, joins a training in progress, and if the head was restarted, the other hosts
        go through the preflight with it.
        """
        settings = self._settings
        ports = [settings.port] if self._phase == TRAIN else [settings.port, settings.port + 1]
        with self._supervisor.interruptible():
            open_port = network.wait_for_port(settings.head, ports, seconds=settings.join_seconds)
        self._phase = TRAIN if open_port == settings.port else PREFLIGHT

    def _attempt(self) -> Ending | None:
        """Run one torchrun on this host to its end; return how it failed, None if it succeeded."""
        report_file, shared_before = self._scratch / f"exit-{self._attempts}.json", read_report(self._shared_report)
        env = torchrun_environment(report_file, shutdown_seconds=120, interface=self._route.interface)
        if self._supervisor.run(self._command(), env, while_joining=self._require_hosts_in_time) == 0:
            return None
        report, shared = read_report(report_file), read_report(self._shared_report)
        # The ranks of this host may only have seen that another host failed, or that it was done and left. The report
        # in the run directory, if it is new, then has the cause.
        has_no_cause = report is None or report["code"] == EXIT_INTERRUPTED
        if has_no_cause and shared and shared != shared_before and shared["code"] != EXIT_INTERRUPTED:
            report = shared
        return Ending.from_report(report, otherwise="")

    def _command(self) -> list[str]:
        """Return the command line of torchrun.

        The id of the rendezvous is made from the run directory, so that a host of another job does not join this one.
        torchrun itself never restarts (--max-restarts=0): after a network failure it would wait for hosts that cannot
        reach each other. Instead, every attempt has a new store, which ends with the torchrun of the head.
        """
        settings, is_head = self._settings, int(self._route.is_here)
        join_timeout = 2 * settings.join_seconds + 600
        return [
            *(*TORCHRUN, f"--nnodes={settings.min_hosts}:{settings.max_hosts}", f"--nproc_per_node={settings.ranks}"),
            *settings.numa_options,
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={settings.head}:{self._port}"),
            *(f"--rdzv-id={zlib.crc32(str(self._run_dir).encode())}", f"--local-addr={self._route.address}"),
            f"--rdzv-conf=is_host={is_head},join_timeout={join_timeout},last_call_timeout={LAST_CALL_SECONDS}",
            *("--max-restarts=0", "--monitor-interval=0.1", SIGNALS_OPTION, "-m", *self._phase, *self._arguments),
        ]

    def _require_hosts_in_time(self, seconds: float) -> None:
        """End this launcher if the hosts did not meet in time. On the head, say which hosts came.

        torchrun has a longer limit, and ends with a traceback that does not say how many hosts are missing.
        """
        required, limit = self._settings.min_hosts, self._settings.join_seconds
        if required == 1 or seconds < limit:
            return
        others = network.connected_hosts(self._port) if self._route.is_here else []
        if self._route.is_here and len(others) + 1 < required:
            listed = ", ".join(["this one", *others])
            say(
                f"{len(others) + 1} of {required} hosts came within {limit} s ({listed}): start the same command on "
                "the missing ones"
            )
        elif seconds >= limit + MEETING_SECONDS:
            say(
                f"{required} hosts did not meet at {self._settings.head} within {limit} s: do all of them have the "
                "same run.dir and NODES?"
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
        # After the preflight and the first training, the lock may be held by ranks of this job that were cut off.
        if not can_retry(ending.code, lock_may_be_ours=self._attempts > 2):
            assert ending.code is not None
            say_end(ending.code, ending.cause)
            return ending.code
        cause = ending.cause_without_advice or "no rank could report the cause, see above"
        if self._tries.count_failure():
            say(f"gave up after {self._tries.limit} attempts without a new checkpoint: {cause}; run it again to go on")
            return EXIT_INTERRUPTED
        if not self._route.is_here:
            self._phase = PREFLIGHT
        say(f"{cause}; starting again (attempt {self._attempts + 1})")
        with self._supervisor.interruptible():
            time.sleep(min(max(self._tries.count, 1), MAX_PAUSE_SECONDS))
        return None
