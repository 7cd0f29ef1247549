"""Launch a job on several hosts without a scheduler: the same command on each of them, in any order.

Every attempt has a store of its own, which ends with the torchrun of the head, and no restart inside of it
(--max-restarts=0): after a network failure such a restart would wait for agents that cannot reach each other, and a new
attempt takes no longer.
"""

import math
import os
import re
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distgpt.config import Config
from distgpt.errors import EXIT_CANNOT_CREATE, EXIT_INTERRUPTED, EXIT_OK, UsageError
from distgpt.launch.agent import TORCHRUN, Supervisor
from distgpt.launch.policy import Ending, Tries, count_from_environment, read_ending, say, say_end
from distgpt.machine import default_ranks
from distgpt.preflight import network
from distgpt.run.exit_report import EXIT_FILE_VARIABLE
from distgpt.run.paths import RunPaths

# Seconds beyond JOIN_SECONDS in which hosts that met may still wait for more.
JOINING_SECONDS = 15
# Attempts in which a locked run directory is another job's; later, ranks of ours that are cut off may hold it.
OWN_LOCK_ATTEMPTS = 2


@dataclass(frozen=True)
class Settings:
    """What the environment says of the hosts."""

    head: str
    port: int  # the next one is that of the preflight
    least: int  # hosts
    most: int
    ranks: int  # on each host
    join_seconds: int
    tries: int


def launch(config: Config, arguments: Sequence[str]) -> int:
    """Take part in a job until its run is done, on this host. Returns the code of the run.

    Raises UsageError before anything starts, Interrupted if the head does not answer.
    """
    settings = settings_from_environment()
    require_batch_for_all_sizes(config, settings)
    # Explicit: a guess from the host name is wrong where names are shared, missing or mean 127.0.1.1.
    route = network.route_to(settings.head)
    for port in (settings.port, settings.port + 1):
        # Two jobs at one rendezvous would silently wait for each other's hosts.
        if route.is_here and network.connection_error(route.address, port, timeout=2) is None:
            raise UsageError(
                f"port {port} of {settings.head} is taken, by another job or one that still ends: choose another in "
                "HEAD (its port and the next one are used)"
            )
    with tempfile.TemporaryDirectory() as scratch:
        return _Job(config, arguments, settings, route, Path(scratch)).run()


def settings_from_environment() -> Settings:
    """Read HEAD, NODES, NPROC_PER_NODE, JOIN_SECONDS and TRIES. Raises UsageError."""
    ranks = count_from_environment("NPROC_PER_NODE", None)
    join_seconds, tries = count_from_environment("JOIN_SECONDS", 600), count_from_environment("TRIES", 10)
    head, nodes = os.environ.get("HEAD", ""), os.environ.get("NODES", "")
    place = re.fullmatch(r"([^:]+):([1-9][0-9]{0,4})", head)
    if place is None or int(place[2]) > 65534:
        raise UsageError(f"HEAD={head} must be host:port: one of the hosts, and a free port on it from 1 to 65534")
    counts = re.fullmatch(r"([1-9][0-9]{0,4})(?::([1-9][0-9]{0,4}))?", nodes)
    if counts is None:
        raise UsageError(f"NODES={nodes} must say how many hosts there are: NODES=4 or NODES=3:4")
    least, most = int(counts[1]), int(counts[2] or counts[1])
    if not least <= most < 2 * least:
        raise UsageError(
            f"NODES={nodes}: the smaller number must be more than half of the larger one, so that only one side goes "
            "on when the network is cut"
        )
    return Settings(place[1], int(place[2]), least, most, ranks or default_ranks(), join_seconds or 600, tries or 10)


def require_batch_for_all_sizes(config: Config, settings: Settings) -> None:
    """Raise UsageError unless the global batch divides for every number of hosts that NODES allows."""
    nodes = os.environ["NODES"]
    if config.parallel.strategy == "diloco" and settings.least < settings.most:
        raise UsageError(f"NODES={nodes}: diloco keeps the number of its replicas, write NODES={settings.most}")
    batch, micro_batch = config.train.global_batch, max(1, config.train.micro_batch)
    sizes = range(settings.least, settings.most + 1)
    for hosts in sizes:
        if batch % (hosts * settings.ranks * micro_batch):
            step = math.lcm(*sizes) * settings.ranks * micro_batch
            raise UsageError(
                f"train.global_batch {batch} does not divide over {hosts} hosts x {settings.ranks} ranks x "
                f"train.micro_batch {micro_batch}: take a multiple of {step}, which divides for NODES={nodes}"
            )


class _Job:
    """The part of this host in a job."""

    def __init__(
        self, config: Config, arguments: Sequence[str], settings: Settings, route: network.Route, scratch: Path
    ) -> None:
        self._config, self._settings, self._route, self._scratch = config, settings, route, scratch
        self._paths = RunPaths(config.run_dir)
        self._tries, self._attempts = Tries(settings.tries, self._paths), 0
        self._supervisor = Supervisor()
        self._gave_up = False  # the other hosts did not come
        # From here on the checkpoints in the run directory are this job's own.
        self._arguments = [*arguments, *([] if self._tries.newest_checkpoint else ["--run.fresh=false"])]

    def run(self) -> int:
        """Check the hosts, train, and start again after a failure."""
        checked = False
        while not self._supervisor.signalled:
            self._attempts += 1
            before = self._run_report()
            preflight = not checked
            if not self._route.is_here:
                # The head decides: a host that comes late, or back, finds training under way and joins it, and a head
                # that was restarted finds the others ready for its preflight.
                port = self._wait_for_head(checked)
                if port is None:
                    break
                preflight = port != self._settings.port
            if preflight:
                status = self._torchrun(self._settings.port + 1, "distgpt.doctor", "--distributed", last_call=10)
            else:
                status = self._torchrun(self._settings.port, "distgpt.train", last_call=3)
            checked = checked or not preflight or status == 0
            if status == 0:
                if preflight:
                    continue
                return EXIT_OK
            if self._gave_up:
                break
            ending = self._ending(before)
            if self._supervisor.signalled:
                cause = f": {ending.cause}" if ending else ""
                say(f"stopped by SIG{self._supervisor.signalled} on this host{cause}")
                break
            if ending and not ending.retryable and not self._may_be_own_lock(ending):
                say_end(ending)
                return ending.code
            cause = ending.reason if ending else "no rank could say why, see above"
            if self._tries.exhausted():
                attempts = f"{self._tries.count} attempts without a new checkpoint"
                say(f"gave up after {attempts}: {cause}; run it again to go on")
                break
            checked = checked and self._route.is_here
            say(f"{cause}; starting again (attempt {self._attempts + 1})")
            self._pause()
        return EXIT_INTERRUPTED

    def _wait_for_head(self, checked: bool) -> int | None:
        ports = [self._settings.port] if checked else [self._settings.port, self._settings.port + 1]
        return network.wait_for_port(
            self._settings.head,
            ports,
            seconds=self._settings.join_seconds,
            stopped=lambda: self._supervisor.signalled,
        )

    def _torchrun(self, port: int, module: str, *flags: str, last_call: int) -> int:
        """Run a module on all hosts. `last_call`: seconds to wait for more than the least number of hosts."""
        settings, route, report = self._settings, self._route, self._report
        nodes = f"{settings.least}:{settings.most}"
        join_timeout = 2 * settings.join_seconds + 600
        environment = {
            EXIT_FILE_VARIABLE: str(report),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", route.interface),
            # NCCL chooses InfiniBand ports by itself; this is for its first contact, and for plain Ethernet.
            "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", route.interface),
            # Each rank sets its own share of the threads; this only keeps torchrun from warning about it.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            # Agents restart their ranks when a host joins; gloo would find stale addresses in the store of before.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            # Seconds that ranks have to save once they are told to stop. torchrun's default is 30.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120"),
        }
        command = [
            *(*TORCHRUN, f"--nnodes={nodes}", f"--nproc_per_node={settings.ranks}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={settings.head}:{port}", f"--local-addr={route.address}"),
            # Hosts find each other by their run directory: one of another job waits for its own hosts.
            f"--rdzv-id={zlib.crc32(str(self._paths.root).encode())}",
            f"--rdzv-conf=is_host={int(route.is_here)},join_timeout={join_timeout},last_call_timeout={last_call}",
            *("--max-restarts=0", "--monitor-interval=0.1"),
            *("-m", module, *flags, *self._arguments),
        ]
        return self._supervisor.run(
            command,
            environment=environment,
            stopped_limit=self._config.health.timeout,
            give_up=lambda seconds: self._why_alone(seconds, port),
        )

    def _why_alone(self, seconds: float, port: int) -> str | None:
        """Say why to give up if the hosts did not meet within JOIN_SECONDS; torchrun would not say who is missing."""
        least, limit = self._settings.least, self._settings.join_seconds
        if least == 1 or seconds < limit:
            return None
        came = network.guests(port) if self._route.is_here else []
        reason = None
        if self._route.is_here and len(came) + 1 < least:
            here = ", ".join(["this one", *came])
            reason = f"{len(came) + 1} of {least} hosts came within {limit} s ({here}): start the same command on the "
            reason += "missing ones"
        elif seconds >= limit + JOINING_SECONDS:
            reason = f"{least} hosts did not meet at {self._settings.head} within {limit} s: have all of them the same "
            reason += "run.dir and NODES?"
        self._gave_up = reason is not None
        return reason

    @property
    def _report(self) -> Path:
        return self._scratch / f"exit-{self._attempts}.json"

    def _ending(self, before: str) -> Ending | None:
        """Return how the attempt ended: by the report of this host, or by a new one of the run that says more.

        Hosts without the trouble only see that others are gone, also when the others are done and left first.
        """
        mine, shared = read_ending(self._report), read_ending(self._paths.exit_report)
        is_new = self._run_report() != before
        return shared if shared and not shared.retryable and is_new and (mine is None or mine.retryable) else mine

    def _run_report(self) -> str:
        try:
            return self._paths.exit_report.read_text()
        except OSError:
            return ""

    def _may_be_own_lock(self, ending: Ending) -> bool:
        return ending.code == EXIT_CANNOT_CREATE and self._attempts > OWN_LOCK_ATTEMPTS

    def _pause(self) -> None:
        deadline = time.monotonic() + min(5, max(1, self._tries.count))
        while time.monotonic() < deadline and not self._supervisor.signalled:
            time.sleep(0.1)
