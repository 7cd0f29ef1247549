"""A watchdog in each rank: who makes no progress is named, all ranks show their stacks, and everything ends at once.

Ranks wait for each other in every step, so one that hangs halts all of them, each in another place. The first whose
time is up calls the others through the store: each writes its stacks to its log and says how far it came. Whoever does
not answer, or came less far than the others, is named. Then each rank ends all ranks of its host with SIGKILL, since
one that is stopped would keep its launcher waiting, and leaves. What the launcher does then, restart or end, it can do
at once. A rank whose watchdog cannot run is ended by a process beside it, backstop.py.
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
from distgpt.run.session import STACKS_SIGNAL, Run

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import Store

# Seconds between two looks at the clock, and for all ranks to answer. With STACK_DUMP_SECONDS, for a rank that did not,
# the limit is exceeded by less than 5.
TICK, ANSWER = 0.5, 2.0
# Seconds without progress and without a neighbour after which one that is told to stop waits for it no longer.
LOST = 5.0
# Seconds that the others have to read the answers in a store that ends with this process.
LINGER = 0.2
# What it does at the end touches the run directory, whose disk may be what hangs: seconds until it ends regardless.
LATEST = 4.0
# A look that comes this late was not the scheduler's doing: the process was suspended, which is no hang.
SUSPENDED = 10.0
CALL, LEFT = "watchdog/call", "watchdog/left"
# What rank 0 does, having checked the rest, when it waits for ranks that may never come.
JOINING = "waiting for the other ranks to join"


class Watchdog:
    """One rank's, a context manager around its whole run. Without a limit, at first, it only looks at its neighbours:
    none of them may be stopped by a signal for `health.timeout` seconds.
    """

    def __init__(self, run: Run, health: HealthConfig) -> None:
        self._run = run
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._stopped_limit = health.timeout
        self._beats, self._doing = 0, "starting"
        self._limit = math.inf
        self._last_beat = time.monotonic()
        self._stopped_since: dict[int, float] = {}
        self._neighbours: set[int] = set()
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
            # If it is still in the store when Python ends and the store goes away, the process is aborted.
            self._listener.join(ANSWER)
            self._leave_store()

    def connect(self, store: "Store") -> None:
        """From here on the ranks can be called together. `store` is one that all of them share."""
        shared: Any = store  # some stubs of torch lack clone()
        # Clients of their own, one a thread: a call in one blocks it.
        self._store, calls = shared.clone(), shared.clone()
        # From here on all ranks do the same; rank 0 had more to do.
        self._beats = 0
        self._listener = threading.Thread(target=self._listen, args=(calls,), name="watchdog-calls", daemon=True)
        self._listener.start()

    def _leave_store(self) -> None:
        """Be the last to leave if this rank keeps the store: torch prints an error for each that finds it gone."""
        assert self._store is not None
        deadline = time.monotonic() + ANSWER
        with suppress(RuntimeError):
            left = self._store.add(LEFT, 1)
            while self._run.rank == 0 and left < self._world_size and time.monotonic() < deadline:
                time.sleep(0.02)
                left = self._store.add(LEFT, 0)

    def beat(self, doing: str, limit: float | None = None) -> None:
        """The rank got somewhere, and goes on with what may take `limit` seconds, None: as many as what it did before.

        For the main thread.
        """
        self._doing, self._last_beat = doing, time.monotonic()
        self._limit = self._limit if limit is None else limit
        self._beats += 1

    @contextmanager
    def during(self, doing: str, limit: float) -> Iterator[None]:
        """Around what has a limit of its own, in seconds."""
        before = self._doing, self._limit
        self.beat(doing, limit)
        yield
        self.beat(*before)

    def follow(self, *models: "nn.Module") -> None:
        """Beat before and after each forward pass: who hangs in one of training stands behind who waits for it.

        `models`: what trains and what it wraps, which may be the same; an evaluation calls the latter.
        """
        for model in set(models):
            # Before FSDP's own hook, which waits for the others.
            model.register_forward_pre_hook(lambda module, _: self._pass(module, "in a forward pass"), prepend=True)
            model.register_forward_hook(lambda module, _, __: self._pass(module, "in a backward pass"))

    def _pass(self, module: "nn.Module", doing: str) -> None:
        self.beat(doing if module.training else self._doing)

    def _watch_with_backstop(self) -> None:
        with self._backstop:
            self._watch()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._ended.is_set():
            called = self._called.wait(TICK)
            now = time.monotonic()
            if now - looked > SUSPENDED:
                self._last_beat = now
            looked = now
            limit = self._limit
            with suppress(OSError):  # it may be gone
                self._backstop.write(f"{limit} ".encode())
            late = now - self._last_beat > limit
            present = ranks_of_this_host()
            stopped = self._stopped(present, now)
            too_long = any(now - since > self._stopped_limit for since in stopped.values())
            gone = self._gone(present, now)
            if (called or late or too_long or gone) and not self._ended.is_set():
                self._end(list(stopped), gone)

    def _stopped(self, present: Mapping[int, int], now: float) -> dict[int, float]:
        """Since when ranks of this host are stopped, by rank."""
        stopped = {rank for rank, pid in present.items() if state_of(pid) == "T"}
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        return self._stopped_since

    def _gone(self, present: Mapping[int, int], now: float) -> list[int]:
        """Ranks of this host that ended, while this one is told to stop and cannot, as torchrun does when it lost one.

        NCCL would wait for it until torchrun's patience ends. In an orderly end all leave sooner after each other.
        """
        self._neighbours |= present.keys()
        absent = sorted(self._neighbours - present.keys())
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in absent}
        if not self._run.told_to_stop or now - self._last_beat <= LOST:
            return []
        return [rank for rank, since in self._gone_since.items() if now - since > LOST]

    def _listen(self, store: "Store") -> None:
        with suppress(RuntimeError):  # the store is gone, and with it the rank that keeps it
            while not self._ended.wait(TICK):
                if store.check([CALL]):
                    self._called.set()
                    return

    def _end(self, stopped: Sequence[int], gone: Sequence[int]) -> None:
        mine = RankProgress(self._run.rank, socket.gethostname(), os.getpid(), self._beats, self._doing, current_line())
        waited = time.monotonic() - self._last_beat
        threading.Thread(target=self._end_regardless, args=(mine,), daemon=True).start()
        self._write_stacks(f"no progress for {waited:.0f} s while {mine.doing}")
        answers = self._ask_all(mine, {*stopped, *gone})
        named = hanging_ranks(answers, self._world_size, stopped, gone)
        alone = self._store is None and not stopped and not gone
        if alone:
            waits = self._doing == JOINING and self._world_size > 1
            named = f"not all of {self._world_size} ranks came to join {mine}" if waits else str(mine)
        cause = (
            f"no progress for {waited:.0f} s: {named}; the stacks of all ranks are in {self._run.paths.logs}: "
            "run it again to go on, or with a longer health.*timeout if it was only slow"
        )
        # The first one on this host may be the one that is stopped.
        first = min(({self._run.rank} | ranks_of_this_host().keys()) - set(stopped)) == self._run.rank
        if self._run.report(EXIT_INTERRUPTED, cause, for_host=first if stopped else alone or None):
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"distgpt: {cause}\n".encode())
        silent = set(range(self._world_size)) - {answer.rank for answer in answers}
        time.sleep(LINGER)
        _end_neighbours(silent)
        os._exit(EXIT_INTERRUPTED)

    def _end_regardless(self, mine: RankProgress) -> None:
        time.sleep(LATEST)
        cause = f"{mine} makes no progress, nor can say so in {self._run.paths.root}: run it again to go on"
        # It may be stderr that nobody reads.
        saying = threading.Thread(target=os.write, args=(2, f"distgpt: {cause}\n".encode()), daemon=True)
        saying.start()
        _end_neighbours(set())
        saying.join(TICK)
        os._exit(EXIT_INTERRUPTED)

    def _write_stacks(self, title: str) -> None:
        with suppress(OSError), (self._run.paths.logs / f"rank-{self._run.rank}.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}; every thread of this rank:\n")
            log.flush()
            faulthandler.dump_traceback(log)
        with suppress(OSError):
            write_flight_recorders(self._run.paths.logs, self._run.rank)

    def _ask_all(self, mine: RankProgress, silent: set[int]) -> list[RankProgress]:
        """The answers that come in time; the store itself may be with the rank that hangs."""
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
    """What the backstop of this rank reads from; it ends when that is closed."""
    command = [sys.executable, "-I", "-S", backstop.__file__, str(logs), str(int(STACKS_SIGNAL))]
    read, write = os.pipe()
    os.set_blocking(write, False)
    # In a session of its own: Ctrl-C in a terminal is not for it.
    subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(read)
    return os.fdopen(write, "wb", buffering=0)


def ranks_of_this_host() -> dict[int, int]:
    """Process ids of the other ranks that this one's agent started, by rank; empty without an agent or /proc."""
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


def _end_neighbours(silent: set[int]) -> None:
    """SIGKILL the other ranks of this host; those that could not write their stacks are made to, stopped or not."""
    neighbours = ranks_of_this_host()
    for number in (STACKS_SIGNAL, signal.SIGCONT):
        for rank in silent & neighbours.keys():
            _send(neighbours[rank], number)
    if silent & neighbours.keys():
        time.sleep(STACK_DUMP_SECONDS)
    for pid in neighbours.values():
        _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _key(rank: int) -> str:
    return f"watchdog/rank-{rank}"
