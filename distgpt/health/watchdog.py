"""A watchdog in each rank: it names the rank that hangs, has all ranks write their stacks, and ends all of them.

Ranks wait for each other in every step, so if one hangs, all of them stand still, each in another place. The first rank
that exceeds its limit calls the others through the store. Each writes its stacks to its log and reports its progress.
A rank that does not answer, or has made less progress than the others, is named. Then each rank kills all ranks of its
host with SIGKILL, since the launcher would wait for a stopped one, and exits. So the launcher can restart or end at
once. backstop.py ends a rank whose watchdog cannot run.
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
from distgpt.files import children_of
from distgpt.health import backstop
from distgpt.health.backstop import STACK_DUMP_SECONDS, state_of
from distgpt.health.diagnosis import RankProgress, current_line, describe_hanging_ranks, write_flight_recorders
from distgpt.run.session import STACKS_SIGNAL, RunSession

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import Store

# Seconds between two checks, and seconds in which all ranks must answer. With STACK_DUMP_SECONDS, for a rank that does
# not answer, a hang ends less than 5 seconds beyond its limit.
TICK_SECONDS, ANSWER_SECONDS = 0.5, 2.0
# Seconds without progress after which a rank that got a signal to stop no longer waits for a lost rank of its host.
LOST_RANK_SECONDS = 5.0
# Seconds that the rank which keeps the store waits at the end for the others to leave it.
LEAVE_SECONDS = 30.0
# Seconds in which the others can read the answers in a store that ends with this process.
LINGER_SECONDS = 0.2
# Seconds in which the watchdog may write to the run directory, whose disk may hang. Then it exits without a report.
REPORT_SECONDS = 4.0
# If the watchdog wakes up this late, the process was suspended, and did not hang.
SUSPENDED_SECONDS = 10.0
CALL, LEFT = "watchdog/call", "watchdog/left"
# The activity of rank 0 after its checks, while it waits for ranks that may never join.
JOINING = "waiting for the other ranks to join"


class Watchdog:
    """The watchdog of one rank, a context manager around its whole run.

    There is no limit before the first heartbeat. At any time, it also ends the run if another rank of its host has been
    stopped by a signal for more than `health.timeout` seconds.
    """

    def __init__(self, run: RunSession, health: HealthConfig) -> None:
        self._run = run
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._stopped_limit = health.timeout
        self._heartbeats, self._activity = 0, "starting"
        self._limit = math.inf
        self._last_heartbeat = time.monotonic()
        self._stopped_since: dict[int, float] = {}
        self._seen_ranks: set[int] = set()
        self._gone_since: dict[int, float] = {}
        self._store: Store | None = None
        self._called, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
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
            # Python aborts if this thread still uses the store when it is freed at exit.
            self._listener.join(ANSWER_SECONDS)
            self._leave_store()

    def connect(self, store: "Store") -> None:
        """Use `store`, which all ranks share, to call them from now on."""
        shared: Any = store  # some stubs of torch lack clone()
        # Rank 0 serves the store as long as it holds this reference: until all ranks have left.
        self._shared_store = shared
        # Each thread needs a client of its own, since calls block.
        self._store, calls = shared.clone(), shared.clone()
        # From here on all ranks record the same heartbeats; before, rank 0 has recorded more.
        self._heartbeats = 0
        self._listener = threading.Thread(target=self._listen, args=(calls,), name="watchdog-calls", daemon=True)
        self._listener.start()

    def _leave_store(self) -> None:
        """Leave the store; rank 0, which keeps it, leaves last: torch prints an error in ranks that find it gone."""
        assert self._store is not None
        deadline = time.monotonic() + LEAVE_SECONDS
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
        """Wrap an activity with a limit of its own, `timeout` seconds."""
        before = self._activity, self._limit
        self.heartbeat(activity, timeout)
        yield
        self.heartbeat(*before)

    def record_forward_passes(self, *models: "nn.Module") -> None:
        """Record a heartbeat before and after each forward pass: a rank that hangs in one has fewer than the others.

        `models`: the model that trains and the GPT inside, which may be the same; an evaluation calls the latter.
        """
        for model in set(models):
            # Prepended, to run before FSDP's own hook, which waits for the others.
            model.register_forward_pre_hook(
                lambda module, _: self._record_pass(module, "in a forward pass"), prepend=True
            )
            model.register_forward_hook(lambda module, _, __: self._record_pass(module, "in a backward pass"))

    def _record_pass(self, module: "nn.Module", activity: str) -> None:
        self.heartbeat(activity if module.training else self._activity)

    def _watch(self) -> None:
        last_tick = time.monotonic()
        with self._backstop:
            while not self._ended.is_set():
                called = self._called.wait(TICK_SECONDS)
                now = time.monotonic()
                if now - last_tick > SUSPENDED_SECONDS:
                    self._last_heartbeat = now
                last_tick, limit = now, self._limit
                with suppress(OSError):  # the backstop may have ended
                    self._backstop.write(f"{limit} ".encode())
                late = now - self._last_heartbeat > limit
                present = ranks_of_this_host()
                stopped = self._stopped_ranks(present, now)
                stopped_too_long = any(now - since > self._stopped_limit for since in stopped.values())
                gone = self._gone_ranks(present, now)
                if (called or late or stopped_too_long or gone) and not self._ended.is_set():
                    self._end_all_ranks(list(stopped), gone)

    def _stopped_ranks(self, present: Mapping[int, int], now: float) -> dict[int, float]:
        """Return the ranks of this host that a signal has stopped, with the time when that was first noticed."""
        stopped = {rank for rank, pid in present.items() if state_of(pid) == "T"}
        self._stopped_since = {rank: self._stopped_since.get(rank, now) for rank in stopped}
        return self._stopped_since

    def _gone_ranks(self, present: Mapping[int, int], now: float) -> list[int]:
        """Return ranks of this host that have ended, if this rank got a signal to stop and makes no progress.

        torchrun sends that signal when it loses a rank, and NCCL would wait for the lost rank until torchrun kills this
        one. In a normal end all ranks leave sooner.
        """
        self._seen_ranks |= present.keys()
        absent = sorted(self._seen_ranks - present.keys())
        self._gone_since = {rank: self._gone_since.get(rank, now) for rank in absent}
        if not self._run.stop_signal_received or now - self._last_heartbeat <= LOST_RANK_SECONDS:
            return []
        return [rank for rank, since in self._gone_since.items() if now - since > LOST_RANK_SECONDS]

    def _listen(self, store: "Store") -> None:
        with suppress(RuntimeError):  # the store ends with rank 0
            while not self._ended.wait(TICK_SECONDS):
                if store.check([CALL]):
                    self._called.set()
                    return

    def _end_all_ranks(self, stopped: Sequence[int], gone: Sequence[int]) -> None:
        own = RankProgress(
            self._run.rank, socket.gethostname(), os.getpid(), self._heartbeats, self._activity, current_line()
        )
        waited = time.monotonic() - self._last_heartbeat
        threading.Thread(target=self._end_after_deadline, args=(own,), daemon=True).start()
        self._write_stacks(f"no progress for {waited:.0f} s while {own.activity}")
        answers = self._gather_progress(own, {*stopped, *gone})
        hanging = describe_hanging_ranks(answers, self._world_size, stopped, gone)
        not_joined = self._store is None and not stopped and not gone
        if not_joined:
            waits_for_ranks = self._activity == JOINING and self._world_size > 1
            hanging = f"not all of {self._world_size} ranks have joined {own}" if waits_for_ranks else str(own)
        cause = (
            f"no progress for {waited:.0f} s: {hanging}; the stacks of all ranks are in {self._run.paths.logs}: "
            "run it again to go on, or with a longer health.*timeout if it was only slow"
        )
        # The first rank of this host may be a stopped one, which cannot report: the first of the others does.
        first_running = min(({self._run.rank} | ranks_of_this_host().keys()) - set(stopped))
        is_first = first_running == self._run.rank if stopped else not_joined
        if self._run.report(EXIT_INTERRUPTED, cause, as_first_of_host=is_first):
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"distgpt: {cause}\n".encode())
        silent = set(range(self._world_size)) - {answer.rank for answer in answers}
        time.sleep(LINGER_SECONDS)
        _kill_ranks_of_host(silent)
        os._exit(EXIT_INTERRUPTED)

    def _end_after_deadline(self, own: RankProgress) -> None:
        time.sleep(REPORT_SECONDS)
        cause = f"{own} makes no progress and cannot write to {self._run.paths.root}: run it again to go on"
        # Writing blocks if nobody reads stderr.
        printing = threading.Thread(target=os.write, args=(2, f"distgpt: {cause}\n".encode()), daemon=True)
        printing.start()
        _kill_ranks_of_host(set())
        printing.join(TICK_SECONDS)
        os._exit(EXIT_INTERRUPTED)

    def _write_stacks(self, title: str) -> None:
        with suppress(OSError), (self._run.paths.logs / f"rank-{self._run.rank}.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}; every thread of this rank:\n")
            log.flush()
            faulthandler.dump_traceback(log)
        with suppress(OSError):
            write_flight_recorders(self._run.paths.logs, self._run.rank)

    def _gather_progress(self, own: RankProgress, silent: set[int]) -> list[RankProgress]:
        """Ask all ranks for their progress and return the answers that come in time: the store may hang too."""
        answers = {self._run.rank: own}

        def ask() -> None:
            if self._store is None:
                return
            with suppress(RuntimeError):
                self._store.set(_key(self._run.rank), json.dumps(asdict(own)))
                self._store.set(CALL, "")
                while missing := set(range(self._world_size)) - answers.keys() - silent:
                    for rank in missing:
                        if self._store.check([_key(rank)]):
                            answers[rank] = RankProgress(**json.loads(self._store.get(_key(rank))))
                    time.sleep(0.05)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_SECONDS)
        return list(answers.values())


def _start_backstop(logs: Path) -> RawIOBase:
    """Start the backstop of this rank. It reads from the stream returned, and ends when that is closed."""
    command = [sys.executable, "-I", "-S", backstop.__file__, str(logs), str(int(STACKS_SIGNAL))]
    read, write = os.pipe()
    os.set_blocking(write, False)
    # A session of its own keeps Ctrl-C in a terminal away from it.
    subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(read)
    return os.fdopen(write, "wb", buffering=0)


def ranks_of_this_host() -> dict[int, int]:
    """Return the process ids of the other ranks of this torchrun, by rank; empty without torchrun or /proc."""
    job, found, siblings = os.environ.get("TORCHELASTIC_RUN_ID"), dict[int, int](), list[int]()
    with suppress(OSError):
        siblings = children_of(os.getppid()) if job is not None else []
    for pid in siblings:
        with suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if pid != os.getpid() and f"TORCHELASTIC_RUN_ID={job}".encode() in variables:
                found |= {int(v.removeprefix(b"RANK=")): pid for v in variables if v.startswith(b"RANK=")}
    return found


def _kill_ranks_of_host(silent: set[int]) -> None:
    """SIGKILL the other ranks of this host. Those that did not answer write their stacks first, even if stopped."""
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
