"""One rank of a run: its signals, lock and log, and the exit code and report with which it ends.

Imports no torch, so that signals are handled from the start of a rank.
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
from distgpt.run.exit_report import EXIT_FILE_VARIABLE, remove_report_of_last_attempt, write_exit_report
from distgpt.run.lock import LEASE, RENEWAL, Owner, RunLock, loss_message, owner_of_this_attempt
from distgpt.run.outcome import outcome, say_end
from distgpt.run.paths import RunPaths
from distgpt.torchrun import RANK_ZERO_SECONDS, print_cause

log = logging.getLogger("distgpt")
log.addHandler(logging.NullHandler())
log.propagate = False  # lines go to logs/ only; messages for the user are printed
logging.raiseExceptions = False  # no traceback on stderr if a full disk has no room for a line

# Signals that a user sends from a terminal, perhaps through a launcher.
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A signal that comes again within this time is a copy of the first one, as Slurm sends it.
ECHO_SECONDS = 1.0
# Makes a rank write the stacks of all its threads to its log, even while it hangs.
STACKS_SIGNAL = signal.SIGUSR2
# Seconds for the report of a rank that ends at once: the disk of the run directory may hang.
REPORT_SECONDS = 10.0
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

    As a context manager it turns whatever ends the run into an exit code, exit.json and one line on stderr, which the
    first rank that knows writes. SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask to stop. A thread, which the C-level handler
    wakes, acts on them, since Python runs no signal handlers while the main thread waits in a rendezvous. Before
    `allow_graceful_stop()` there is nothing to save, and the thread ends the process. Afterwards a signal sets
    `stop_requested`, and all ranks stop at the same step; a second Ctrl-C ends the process without a save.
    """

    def __init__(self, paths: RunPaths, rank: int) -> None:
        self.paths = paths
        self.rank = rank
        self.step: int | None = None
        self.stop_requested: str | None = None
        self.stop_signal_received = False
        self.owner: Owner | None = None
        self._lock: RunLock | None = None
        self._lock_refused = False
        self._ending_lock = threading.Lock()
        self._reports_in_directory = False
        self._starting = True

    def __enter__(self) -> Self:
        remove_report_of_last_attempt()
        sys.stdout, sys.stderr = _LossyStream(sys.stdout), _LossyStream(sys.stderr)
        # Signal handlers write to it until the process ends.
        self._wakeup = socket.socketpair()
        self._wakeup[1].setblocking(False)
        signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._request_stop)
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # until there is a log for the stacks
        threading.Thread(target=self._handle_signals, name="stop-signals", daemon=True).start()
        return self

    def acquire(self, *, lease: float = LEASE, renewal: float = RENEWAL) -> None:
        """Take the run directory on rank 0, and renew its lease from now on, in seconds. Raises as RunLock does."""
        self._lock_refused = True
        self._lock = RunLock(self.paths, lease=lease)
        self._lock_refused = False
        self._report_in_directory_of(self._lock.owner)
        self._lock.renew_in_background(self._exit_lost, every=renewal)
        self.paths.logs.mkdir(exist_ok=True)  # the watchdog writes stacks there if the start hangs

    def attach_logs(self, owner: Owner | None) -> None:
        """Open the log of this rank, once all ranks have joined and rank 0 is the `owner` of the run directory."""
        self.owner = owner
        self._reports_in_directory = True
        self.paths.logs.mkdir(exist_ok=True)
        stream = (self.paths.logs / f"rank-{self.rank}.log").open("a", buffering=1)
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        faulthandler.enable(stream)
        faulthandler.register(STACKS_SIGNAL, stream)

    def sees_same_directory(self, owner: Owner) -> bool:
        """Tell whether the run directory of this rank is the one that rank 0 took as `owner`.

        Takes up to NFS_ATTRIBUTE_CACHE_SECONDS.
        """
        deadline = time.monotonic() + NFS_ATTRIBUTE_CACHE_SECONDS
        while True:
            with suppress(OSError):
                if loss_message(self.paths, owner) is None:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)

    def require_owned(self) -> None:
        """End this process if another job has taken the run directory. Any thread may call it. Raises OSError."""
        if self.owner and (message := loss_message(self.paths, self.owner)):
            self._exit_lost(message)

    def allow_graceful_stop(self) -> None:
        """From now on, let a signal stop the run at the end of a step, not at once."""
        self._starting = False

    def say(self, text: str) -> None:
        """Log a line, and print it on rank 0."""
        log.info(text)
        if self.rank == 0:
            tqdm.write(text)

    def interrupted(self, last: int) -> Interrupted:
        """Return the error to raise once all ranks have agreed to stop and saved `self.step` of `last` steps."""
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
        not_joined = self.rank != 0 and not self._reports_in_directory
        prints = self.report(code, cause)
        if code == EXIT_BUG and (prints or not_joined):
            traceback.print_exception(error)
        if prints:
            say_end(code, cause)
        if not_joined:
            # If rank 0 has the same error, torchrun ends this rank meanwhile with SIGTERM.
            time.sleep(RANK_ZERO_SECONDS)
            if self.report(code, cause, as_first_of_host=True) and not prints:
                say_end(code, cause)
        self._release()
        _end_process(code)

    def report(self, code: int, cause: str, *, as_first_of_host: bool | None = None) -> bool:
        """Report why the run ends. Returns whether this rank is the one to print it.

        Ends the process if another job has taken the run directory.
        Of ranks that have not joined the others, rank 0 and the first one of each host report, the latter to their
        launcher. `as_first_of_host`: whether this rank is that one; None: if its local rank is 0. If it is, and rank 0
        already has the run directory, the report goes there, before one of rank 0.
        """
        if as_first_of_host and self.rank and not self._reports_in_directory:
            with suppress(OSError):
                self._report_in_directory_of(owner_of_this_attempt(self.paths))
        with suppress(OSError):
            self.require_owned()
        if self.rank and not self._reports_in_directory:
            # The other ranks of the host and rank 0 probably fail alike: one line for each host, for its launcher.
            if not (os.environ.get("LOCAL_RANK") == "0" if as_first_of_host is None else as_first_of_host):
                return False
        elif not self._reports_in_directory and self.paths.root.is_dir() and not self._lock_refused:
            with suppress(DistgptError):
                self._lock = RunLock(self.paths, lease=0)
                self._report_in_directory_of(self._lock.owner)
        paths, fence = (self.paths if self._reports_in_directory else None), (self.owner.fence if self.owner else 0)
        return write_exit_report(paths, code=code, cause=cause, rank=self.rank, step=self.step, fence=fence)

    def _report_in_directory_of(self, owner: Owner | None) -> None:
        if owner is not None:
            self.owner, self._reports_in_directory = owner, True

    def _exit_lost(self, message: str) -> NoReturn:
        """End this process because another job has taken the run directory; rank 0 prints `message`."""
        self._ending_lock.acquire()  # never released, so that only one thread prints the message
        log.error(message)
        write_exit_report(None, code=EXIT_CANNOT_CREATE, cause=message, rank=self.rank, step=self.step)
        if self.rank == 0:
            print_cause(f"distgpt: error: {message}")
        _end_process(EXIT_CANNOT_CREATE)

    def _release(self) -> None:
        if self._lock:
            self._lock.release()

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = signal.Signals(number).name

    def _handle_signals(self) -> None:
        # torchrun gets a second Ctrl-C itself, and ends its ranks.
        acknowledged, torchrun = None, "TORCHELASTIC_RUN_ID" in os.environ
        while received := self._wakeup[0].recv(1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            # The main thread cannot set stop_requested while it is in a call of C.
            self.stop_signal_received = True
            if self._starting:
                name = signal.Signals(number).name
                self._exit_interrupted(f"interrupted by {name} before the first step: run it again to go on")
            elif acknowledged is None:
                acknowledged = time.monotonic()
                _acknowledge(number)
            elif number == signal.SIGINT and not torchrun and time.monotonic() - acknowledged > ECHO_SECONDS:
                self._exit_interrupted(
                    "interrupted by a second Ctrl-C: steps after the newest checkpoint are not saved, "
                    "run it again to go on from there"
                )

    def _exit_interrupted(self, cause: str) -> NoReturn:
        deadline = threading.Timer(REPORT_SECONDS, os._exit, [EXIT_INTERRUPTED])
        deadline.daemon = True
        deadline.start()
        if self.report(EXIT_INTERRUPTED, cause):
            say_end(EXIT_INTERRUPTED, cause)
        self._release()
        _end_process(EXIT_INTERRUPTED)


def _acknowledge(number: int) -> None:
    """Print on each host that a signal to stop has arrived: the step may be long."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # torchrun by itself waits for its ranks after a second Ctrl-C, too.
        heeded = "TORCHELASTIC_RUN_ID" not in os.environ or EXIT_FILE_VARIABLE in os.environ
        again = "; Ctrl-C again stops it now, unsaved" if heeded and number in TERMINAL_SIGNALS else ""
        below_the_bar = "\n" if sys.stderr.isatty() else ""
        print(f"{below_the_bar}distgpt: stopping after this step is saved{again}", file=sys.stderr, flush=True)


def _end_process(code: int) -> NoReturn:
    """End the process now: a normal exit would join threads that wait for lost ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)
