"""One rank of a run: its signals, lock and log, and the exit code and report with which it ends.

Imports no torch, so that all of it is in force from the first moment of a rank.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self, TextIO

from tqdm import tqdm

from distgpt.errors import (
    EXIT_BUG,
    EXIT_CANNOT_CREATE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    STOP_SIGNALS,
    DistgptError,
    Interrupted,
)
from distgpt.run.exit_report import forget_last_attempt, write_exit_report
from distgpt.run.lock import LEASE, RENEWAL, Owner, RunLock, loss_of, owner_of_this_attempt
from distgpt.run.outcome import outcome, say_end
from distgpt.run.paths import RunPaths
from distgpt.torchrun import RANK_ZERO_SECONDS, print_cause

log = logging.getLogger("distgpt")
log.addHandler(logging.NullHandler())
log.propagate = False  # what a person should read is printed; the log is for logs/
logging.raiseExceptions = False  # where a full disk has no room for a line, there is no traceback on stderr

# Signals that a person at a terminal sends, or a launcher for a person.
TYPED = (signal.SIGINT, signal.SIGTERM)
# A signal that comes again within this time is an echo of the first.
ECHO_SECONDS = 1.0
# Makes a rank write the stacks of all its threads to its log, whatever the rank does.
STACKS_SIGNAL = signal.SIGUSR2
# Seconds that a rank has for its report when it must end at once.
LATEST_SECONDS = 10.0
# Seconds for which a network file system may answer from its cache of a directory: acdirmax of nfs(5).
NFS_ATTRIBUTE_CACHE_SECONDS = 60.0


class _LossyStream:
    """stdout or stderr that drops output once its reader is gone, such as a closed terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RunSession:
    """One rank of a run, from its first moment to its exit code.

    As a context manager it turns whatever ends the run into an exit code, exit.json and one line on stderr, from the
    rank that knew first. SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask to stop at a step that all ranks agree on. Before
    `allow_graceful_stop()` there is nothing to save, and the main thread may wait in a rendezvous, where Python does
    not run its signal handlers: a thread that the C-level handler wakes ends the process. Afterwards a signal sets
    `stop_requested`. That thread says so at once, since a step may be long; a second Ctrl-C ends the process unsaved.
    """

    def __init__(self, paths: RunPaths, rank: int) -> None:
        self.paths = paths
        self.rank = rank
        self.step: int | None = None
        self.stop_requested: str | None = None
        self.told_to_stop = False
        self.owner: Owner | None = None
        self._lock: RunLock | None = None
        self._refused = False
        self._ending = threading.Lock()
        self._writes_report = False
        self._starting = True

    def __enter__(self) -> Self:
        forget_last_attempt()
        sys.stdout, sys.stderr = _LossyStream(sys.stdout), _LossyStream(sys.stderr)
        # Kept open for the life of the process.
        self._wakeup = socket.socketpair()
        self._wakeup[1].setblocking(False)
        signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._remember)
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # until there is a log for the stacks
        threading.Thread(target=self._heed_signals, name="stop-signals", daemon=True).start()
        return self

    def acquire(self, *, lease: float = LEASE, renewal: float = RENEWAL) -> None:
        """Take the run directory, on rank 0, and renew its lease from now on. Raises as RunLock does."""
        self._refused = True
        self._lock = RunLock(self.paths, lease=lease)
        self._refused = False
        self.owner = self._lock.owner
        self._lock.keep(self._leave_to, every=renewal)
        self._writes_report = True
        self.paths.logs.mkdir(exist_ok=True)  # for the stacks of a start that hangs

    def attach_logs(self, owner: Owner | None) -> None:
        """Open the log of this rank, once all ranks are here and rank 0 is the `owner` of the run directory."""
        self.owner = owner
        self._writes_report = True
        self.paths.logs.mkdir(exist_ok=True)
        stream = (self.paths.logs / f"rank-{self.rank}.log").open("a", buffering=1)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        faulthandler.enable(stream)
        faulthandler.register(STACKS_SIGNAL, stream)

    def sees_same_directory(self, owner: Owner | None) -> bool:
        """Check that the run directory of this rank is the one that rank 0 took as `owner`.

        May take NFS_ATTRIBUTE_CACHE_SECONDS.
        """
        deadline = time.monotonic() + NFS_ATTRIBUTE_CACHE_SECONDS
        while True:
            with suppress(OSError):
                if owner is None or loss_of(self.paths, owner) is None:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)

    def require_owned(self) -> None:
        """End this process, from whichever thread, if another job has taken the run directory. Raises OSError."""
        if self.owner and (line := loss_of(self.paths, self.owner)):
            self._leave_to(line)

    def allow_graceful_stop(self) -> None:
        """Make signals wait for the end of a step from now on."""
        self._starting = False

    def say(self, text: str) -> None:
        """Log a line, and show it to a person where this is rank 0."""
        log.info(text)
        if self.rank == 0:
            tqdm.write(text)

    def interrupted(self, last: int) -> Interrupted:
        """Return the error to raise once all ranks agreed to stop and saved `step`, if there is one, of `last`."""
        cause = f"interrupted by {self.stop_requested or 'a signal to another rank'}"
        if not self.step:
            return Interrupted(f"{cause} before the end of the first step: run it again to go on")
        return Interrupted(f"{cause}: step {self.step} of {last} is saved, run it again to go on")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self.rank == 0:
                self.report(EXIT_OK, "done")
            self._release()
            return
        code, cause = outcome(error, training=not self._starting)
        log.error("%s", cause, exc_info=error if code == EXIT_BUG else None)
        alone = self.rank != 0 and not self._writes_report
        told = self.report(code, cause)
        if code == EXIT_BUG and (told or alone):
            traceback.print_exception(error)
        if told:
            say_end(code, cause)
        if alone:
            time.sleep(RANK_ZERO_SECONDS)  # until torchrun's SIGTERM, as soon as rank 0 has left
            # It has not: what went wrong did so here alone.
            if self.report(code, cause, for_host=True) and not told:
                say_end(code, cause)
        self._release()
        _leave(code)

    def report(self, code: int, cause: str, *, for_host: bool | None = None) -> bool:
        """Report why the run ends. Returns whether this rank is the one to print it.

        Does not return if the run directory belongs to another job by now.
        `for_host`: whether this rank reports for its host if not all ranks have joined; None: if it is the first one
        there. If rank 0 has the run directory by then, the report goes there, and one of rank 0 comes second.
        """
        if for_host and self.rank and not self._writes_report:
            self._report_as_joined()
        with suppress(OSError):
            self.require_owned()
        if self._writes_report:
            fence = self.owner.fence if self.owner else 0
            return write_exit_report(self.paths, code=code, cause=cause, rank=self.rank, step=self.step, fence=fence)
        if self.rank:
            # The cause probably stops the other ranks of the host and rank 0, too: one line a host, for its launcher.
            if not (os.environ.get("LOCAL_RANK") == "0" if for_host is None else for_host):
                return False
            return write_exit_report(None, code=code, cause=cause, rank=self.rank, step=None)
        with suppress(DistgptError):
            if self.paths.root.is_dir() and not self._refused:
                self._lock = RunLock(self.paths, wait=False)
        paths, fence = (self.paths, self._lock.owner.fence) if self._lock else (None, 0)
        return write_exit_report(paths, code=code, cause=cause, rank=0, step=None, fence=fence)

    def _report_as_joined(self) -> None:
        """Report in the run directory if rank 0 of this attempt has it by now."""
        with suppress(OSError):
            owner = owner_of_this_attempt(self.paths)
            if owner is not None:
                self.owner, self._writes_report = owner, True

    def _leave_to(self, line: str) -> NoReturn:
        """End this process, whose run directory belongs to another job by now; rank 0 prints `line`."""
        self._ending.acquire()  # and never released: of two threads that find it, one says it
        log.error(line)
        write_exit_report(None, code=EXIT_CANNOT_CREATE, cause=line, rank=self.rank, step=self.step)
        if self.rank == 0:
            print_cause(f"distgpt: error: {line}")
        _leave(EXIT_CANNOT_CREATE)

    def _release(self) -> None:
        if self._lock:
            self._lock.release()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = signal.Signals(number).name

    def _heed_signals(self) -> None:
        answered: float | None = None
        while received := self._wakeup[0].recv(1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            # Also where the main thread is in a call of C, and cannot set stop_requested.
            self.told_to_stop = True
            if self._starting:
                name = signal.Signals(number).name
                self._leave_interrupted(f"interrupted by {name} before the first step: run it again to go on")
            elif answered is None:
                answered = time.monotonic()
                _acknowledge(number)
            elif number == signal.SIGINT and _is_typed_again(answered):
                self._leave_interrupted(
                    "interrupted by a second Ctrl-C: what came after the newest checkpoint is not saved, "
                    "run it again to go on from there"
                )

    def _leave_interrupted(self, cause: str) -> NoReturn:
        # The disk of the run directory may hang.
        threading.Thread(target=_leave_regardless, daemon=True).start()
        if self.report(EXIT_INTERRUPTED, cause):
            say_end(EXIT_INTERRUPTED, cause)
        self._release()
        _leave(EXIT_INTERRUPTED)


def _acknowledge(number: int) -> None:
    """Say at once, on each host, that a signal to stop arrived."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        again = "; Ctrl-C again within it ends now, unsaved" if number in TYPED else ""
        below_the_bar = "\n" if sys.stderr.isatty() else ""
        print(f"{below_the_bar}distgpt: stopping after this step is saved{again}", file=sys.stderr, flush=True)


def _is_typed_again(answered: float) -> bool:
    """Tell whether a SIGINT now is the second one of a person, and no echo: Slurm may send one twice to each rank.

    Never under torchrun, which gets a second SIGINT itself, and ends its ranks.
    """
    return "TORCHELASTIC_RUN_ID" not in os.environ and time.monotonic() - answered > ECHO_SECONDS


def _leave_regardless() -> None:
    """End the process in LATEST_SECONDS, whatever its other threads wait for."""
    time.sleep(LATEST_SECONDS)
    os._exit(EXIT_INTERRUPTED)


def _leave(code: int) -> NoReturn:
    """End now: an orderly exit would wait for threads that wait for lost ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)
