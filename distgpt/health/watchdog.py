"""A watchdog in each rank: it names the rank that hangs, has all ranks write their stacks, and ends all of them.

Ranks wait for each other in every step, so a rank that hangs halts all of them, each in another place. The first rank
whose time is up calls the others through the store. Each writes its stacks to its log and reports how far it came. The
rank that does not answer, or came less far than the others, is named. Then each rank kills all ranks of its host with
SIGKILL, since a stopped one would keep its launcher waiting, and exits. The launcher can restart or end at once.
backstop.py ends a rank whose watchdog cannot run.
"""

import faulthandler
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from distgpt.config import HealthConfig
from distgpt.errors import EXIT_INTERRUPTED
from distgpt.health import backstop
from distgpt.health.backstop import STACK_DUMP_SECONDS, state_of
from distgpt.health.diagnosis import RankProgress, current_line, hanging_ranks, write_flight_recorders
from distgpt.run.session import STACKS_SIGNAL, RunSession

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import Store

# Seconds between two looks at the clock, and for all ranks to answer. With STACK_DUMP_SECONDS, for a rank that did not,
# the limit is exceeded by less than 5.
TICK, ANSWER = 0.5, 2.0
# Seconds without progress after which a rank that was told to stop no longer waits for a lost rank of its host.
LOST = 5.0
# Seconds that the rank which keeps the store waits at the end for the others to leave it.
LEAVE = 30.0
# Seconds that the others have to read the answers in a store that ends with this process.
LINGER = 0.2
# At the end the watchdog writes to the run directory, whose disk may hang: seconds until it exits regardless.
LATEST = 4.0
# If the watchdog wakes up this late, the process was suspended, which is no hang.
SUSPENDED = 10.0
CALL, LEFT = "watchdog/call", "watchdog/left"
# The activity of rank 0 while it waits, after its checks, for ranks that may never come.
JOINING = "waiting for the other ranks to join"


class Watchdog:
    """The watchdog of one rank, a context manager around its whole run.

    At first there is no limit, and it only looks at the other ranks of its host: none of them may be stopped by a
    signal for `health.timeout` seconds.
    """

    def __init__(self, run: RunSession, health: HealthConfig) -> None:
        self._run = run
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._stopped_limit = health.timeout
        self._heartbeats, self._activity = 0, "starting"
        self._limit = math.inf
        self._last_heartbeat = time.monotonic()
        self._stopped_since: dict[int, float] = {}
        self._seen: set[int] = set()
        self._gone_since: dict[int, float] = {}
        self._store: Store | None = None
        self._called, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch_with_backstop, name="watchdog", daemon=True)
        self._listener: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._backstop = _start_backstop(self._run.paths.logs)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._listener is not None and error is None:
            # If this thread still uses the store when Python ends and frees it, the process is aborted.
            self._listener.join(ANSWER)
            self._leave_store()

    def connect(self, store: "Store") -> None:
        """Call all ranks through `store`, which all of them share, from now on."""
        shared: Any = store  # some stubs of torch lack clone()
        # A client for each thread: a call blocks its client.
        self._store, calls = shared.clone(), shared.clone()
        # From here on all ranks count the same heartbeats; rank 0 had more to do.
        self._heartbeats = 0
        self._listener = threading.Thread(target=self._listen, args=(calls,), name="watchdog-calls", daemon=True)
        self._listener.start()

    def _leave_store(self) -> None:
        """Leave last if this rank keeps the store: torch prints an error for each rank that finds it gone."""
        assert self._store is not None
        deadline = time.monotonic() + LEAVE
        with suppress(RuntimeError):
            left = self._store.add(LEFT, 1)
            while self._run.rank == 0 and left < self._world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._store.add(LEFT, 0)

    def heartbeat(self, activity: str, timeout: float | None = None) -> None:
        """Record progress and start `activity`, which may take `timeout` seconds (None: keep the limit).

        Only the main thread calls it.
        """
        self._activity, self._last_heartbeat = activity, time.monotonic()
        self._limit = self._limit if timeout is None else timeout
        self._heartbeats += 1

    @contextmanager
    def during(self, activity: str, timeout: float) -> Iterator[None]:
        """Wrap an activity that has a limit of its own, in seconds."""
        before = self._activity, self._limit
        self.heartbeat(activity, timeout)
        yield
        self.heartbeat(*before)

    def follow(self, *models: "nn.Module") -> None:
        """Record a heartbeat before and after each forward pass: a rank that hangs in one is behind those that wait.

        `models`: the model that trains and the one inside it, which may be the same; an evaluation calls the latter.
        """
        for model in set(models):
            # Before FSDP's own hook, which waits for the others.
            model.register_forward_pre_hook(lambda module, _: self._pass(module, "in a forward pass"), prepend=True)
            model.register_forward_hook(lambda module, _, __: self._pass(module, "in a backward pass"))

    def _pass(self, module: "nn.Module", activity: str) -> None:
        self.heartbeat(activity if module.training else self._activity)

    def _watch_with_backstop(self) -> None:
        with self._backstop:
            self._watch()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.is_set():
            called = self._called.wait(TICK)
            now = time.monotonic()
            if now - looked > SUSPENDED:
                self._last_heartbeat = now
            looked = now
            limit = self._limit
            with suppress(OSError):  # it may be gone
                self._backstop.write(f"{limit} ".encode())
            late = now - self._last_heartbeat > limit
            present = ranks_of_this_host()
            stopped = self._stopped(present, now)
            too_long = any(now - since > self._stopped_limit for since in stopped.values())
            gone = self._gone(present, now)
            if (called or late or too_long or gone) and not self._ended.is_set():
                self._end(list(stopped), gone)

    def _stopped(self, present: Mapping[int, int], now: float) -> dict[int, float]:
        """Return since when ranks of this host are stopped, by rank."""
        stopped = {rank for rank, pid in present.items() if state_of(pid) == "T"}
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        return self._stopped_since

    def _gone(self, present: Mapping[int, int], now: float) -> list[int]:
        """Return ranks of this host that ended, if torchrun lost one, told this rank to stop, and it makes no progress.

        NCCL would wait for the lost rank until torchrun kills this one. In an orderly end all ranks leave sooner.
        """
        self._seen |= present.keys()
        absent = sorted(self._seen - present.keys())
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in absent}
        if not self._run.told_to_stop or now - self._last_heartbeat <= LOST:
            return []
        return [rank for rank, since in self._gone_since.items() if now - since > LOST]

    def _listen(self, store: "Store") -> None:
        with suppress(RuntimeError):  # the store is gone, and with it the rank that keeps it
            while not self._ended.wait(TICK):
                if store.check([CALL]):
                    self._called.set()
                    return

    def _end(self, stopped: Sequence[int], gone: Sequence[int]) -> None:
        mine = RankProgress(
            self._run.rank, socket.gethostname(), os.getpid(), self._heartbeats, self._activity, current_line()
        )
        waited = time.monotonic() - self._last_heartbeat
        threading.Thread(target=self._end_regardless, args=(mine,), daemon=True).start()
        self._write_stacks(f"no progress for {waited:.0f} s while {mine.activity}")
        answers = self._ask_all(mine, {*stopped, *gone})
        named = hanging_ranks(answers, self._world_size, stopped, gone)
        alone = self._store is None and not stopped and not gone
        if alone:
            waits = self._activity == JOINING and self._world_size > 1
            named = f"not all of {self._world_size} ranks came to join {mine}" if waits else str(mine)
        cause = (
            f"no progress for {waited:.0f} s: {named}; the stacks of all ranks are in {self._run.paths.logs}: "
            "run it again to go on, or with a longer health.*timeout if it was only slow"
        )
        # The first rank on this host may be the stopped one.
        first = min(({self._run.rank} | ranks_of_this_host().keys()) - set(stopped)) == self._run.rank
        if self._run.report(EXIT_INTERRUPTED, cause, for_host=first if stopped else alone or None):
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"distgpt: {cause}\n".encode())
        silent = set(range(self._world_size)) - {answer.rank for answer in answers}
        time.sleep(LINGER)
        _kill_ranks_of_host(silent)
        os._exit(EXIT_INTERRUPTED)

    def _end_regardless(self, mine: RankProgress) -> None:
        time.sleep(LATEST)
        cause = f"{mine} makes no progress, nor can say so in {self._run.paths.root}: run it again to go on"
        # Writing may block where nobody reads stderr.
        printing = threading.Thread(target=os.write, args=(2, f"distgpt: {cause}\n".encode()), daemon=True)
        printing.start()
        _kill_ranks_of_host(set())
        printing.join(TICK)
        os._exit(EXIT_INTERRUPTED)

    def _write_stacks(self, title: str) -> None:
        with suppress(OSError), (self._run.paths.logs / f"rank-{self._run.rank}.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}; every thread of this rank:\n")
            log.flush()
            faulthandler.dump_traceback(log)
        with suppress(OSError):
            write_flight_recorders(self._run.paths.logs, self._run.rank)

    def _ask_all(self, mine: RankProgress, silent: set[int]) -> list[RankProgress]:
        """Return the answers that come in time; the rank that hangs may be the one that keeps the store."""
        answers = {self._run.rank: mine}

        def ask() -> None:
            if self._store is None:
                return
            with suppress(RuntimeError):
                self._store.set(_key(self._run.rank), json.dumps(asdict(mine)))
                self._store.set(CALL, "")
                while missing := set(range(self._world_size)) - answers.keys() - silent:
                    for rank in missing:
                        if self._store.check([_key(rank)]):
                            answers[rank] = RankProgress(**json.loads(self._store.get(_key(rank))))
                    time.sleep(0.05)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER)
        return list(answers.values())


def _start_backstop(logs: Path) -> RawIOBase:
    """Start the backstop of this rank; it reads from the stream returned, and ends when that is closed."""
    command = [sys.executable, "-I", "-S", backstop.__file__, str(logs), str(int(STACKS_SIGNAL))]
    read, write = os.pipe()
    os.set_blocking(write, False)
    # In a session of its own, so that it gets no Ctrl-C from a terminal.
    subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(read)
    return os.fdopen(write, "wb", buffering=0)


def ranks_of_this_host() -> dict[int, int]:
    """Return the process ids of the other ranks of this agent, by rank; empty without an agent or /proc."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    agent = os.getppid()
    found: dict[int, int] = {}
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split() if job is not None else []
    except OSError:
        return found
    for pid in map(int, children):
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if pid != os.getpid() and f"TORCHELASTIC_RUN_ID={job}".encode() in variables:
                found |= {int(v.removeprefix(b"RANK=")): pid for v in variables if v.startswith(b"RANK=")}
    return found


def _kill_ranks_of_host(silent: set[int]) -> None:
    """SIGKILL the other ranks of this host; those that did not answer write their stacks first, stopped or not."""
    others = ranks_of_this_host()
    for number in (STACKS_SIGNAL, signal.SIGCONT):
        for rank in silent & others.keys():
            _send(others[rank], number)
    if silent & others.keys():
        time.sleep(STACK_DUMP_SECONDS)
    for pid in others.values():
        _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _key(rank: int) -> str:
    return f"watchdog/rank-{rank}"
