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
from distgpt.run.lock import LEASE, RENEWAL, Owner, RunLock, lost_directory_message, owner_of_this_attempt
from distgpt.run.outcome import outcome, say_end
from distgpt.run.paths import RunPaths
from distgpt.torchrun import RANK_ZERO_SECONDS, print_cause

log = logging.getLogger("distgpt")
log.addHandler(logging.NullHandler())
log.propagate = False  # lines go to logs/ only; messages for the user are printed
logging.raiseExceptions = False  # no traceback on stderr if a full disk has no room for a line

# Signals that a user sends from a terminal, perhaps through a launcher.
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A second signal within this time is a copy of the first one, such as Slurm sends.
ECHO_SECONDS = 1.0
# This signal makes a rank write the stacks of all its threads to its log, even while it hangs.
STACKS_SIGNAL = signal.SIGUSR2
# A rank that a signal ends at once has this many seconds to write its report: the disk may hang.
REPORT_SECONDS = 10.0
# A network file system may answer from its cache of a directory for this long: acdirmax in nfs(5).
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

    As a context manager it turns the end of the run, whatever its cause, into an exit code, exit.json and one line on
    stderr. The first rank that knows the cause writes them.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask to stop. Python runs no signal handler while the main thread is in a C call,
    such as the wait for other ranks. So a thread acts on signals. Python's C-level handler wakes it through a socket.
    Before `allow_graceful_stop()` there is nothing to save, and the thread ends the process. Afterwards a signal sets
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
        # Never closed: the C-level signal handler writes to it until the process ends.
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
        """Take the run directory on rank 0, and renew it every `renewal` seconds. Raises the errors of RunLock."""
        self._lock_refused = True
        self._lock = RunLock(self.paths, lease=lease)
        self._lock_refused = False
        self._set_owner(self._lock.owner)
        self._lock.renew_in_background(self._exit_lost, every=renewal)
        self.paths.logs.mkdir(exist_ok=True)  # the watchdog writes stacks there if the start hangs

    def attach_logs(self, owner: Owner | None) -> None:
        """Open the log of this rank, once all ranks have joined. `owner`: rank 0, as the owner of the run directory."""
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
        """Tell whether this rank sees the run directory of rank 0, which is its `owner`.

        Takes up to NFS_ATTRIBUTE_CACHE_SECONDS.
        """
        deadline = time.monotonic() + NFS_ATTRIBUTE_CACHE_SECONDS
        while True:
            with suppress(OSError):
                if lost_directory_message(self.paths, owner) is None:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)

    def require_owned(self) -> None:
        """End this process if another job has taken the run directory. Any thread may call it. Raises OSError."""
        if self.owner and (message := lost_directory_message(self.paths, self.owner)):
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
        must_print = self.report(code, cause)
        if code == EXIT_BUG and (must_print or not_joined):
            traceback.print_exception(error)
        if must_print:
            say_end(code, cause)
        if not_joined:
            # If rank 0 has the same error, torchrun ends this rank with SIGTERM during this wait.
            time.sleep(RANK_ZERO_SECONDS)
            if self.report(code, cause, as_first_of_host=True) and not must_print:
                say_end(code, cause)
        self._release()
        _end_process(code)

    def report(self, code: int, cause: str, *, as_first_of_host: bool = False) -> bool:
        """Report why the run ends. Returns whether this rank is the one to print it.

        Before the ranks have joined, they probably fail alike. So only rank 0 reports in the run directory, and local
        rank 0 of every other host to its launcher. `as_first_of_host`: this rank reports in place of local rank 0. If
        rank 0 of this attempt owns the run directory, the report goes there too.

        Ends the process if another job has taken the run directory.
        """
        if as_first_of_host and self.rank and not self._reports_in_directory:
            with suppress(OSError):
                if owner := owner_of_this_attempt(self.paths):
                    self._set_owner(owner)
        with suppress(OSError):
            self.require_owned()
        if self.rank and not self._reports_in_directory:
            if not as_first_of_host and os.environ.get("LOCAL_RANK") != "0":
                return False
        elif not self._reports_in_directory and self.paths.root.is_dir() and not self._lock_refused:
            with suppress(DistgptError):
                self._lock = RunLock(self.paths, lease=0)
                self._set_owner(self._lock.owner)
        paths, fence = (self.paths if self._reports_in_directory else None), (self.owner.fence if self.owner else 0)
        return write_exit_report(paths, code=code, cause=cause, rank=self.rank, step=self.step, fence=fence)

    def _set_owner(self, owner: Owner) -> None:
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
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        acknowledged_at: float | None = None
        while received := self._wakeup[0].recv(1):
            number = received[0]
            if number not in STOP_SIGNALS:
                continue
            # The main thread cannot set stop_requested while it is in a C call.
            self.stop_signal_received = True
            if self._starting:
                name = signal.Signals(number).name
                self._exit_interrupted(f"interrupted by {name} before the first step: run it again to go on")
            elif acknowledged_at is None:
                acknowledged_at = time.monotonic()
                _acknowledge(number)
            # torchrun handles a second Ctrl-C itself: it ends its ranks.
            elif number == signal.SIGINT and not under_torchrun and time.monotonic() - acknowledged_at > ECHO_SECONDS:
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
    """Print on each host that a signal to stop has arrived, since the step may take long."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        # A torchrun without our launcher waits for its ranks after a second Ctrl-C, too.
        can_stop_now = "TORCHELASTIC_RUN_ID" not in os.environ or EXIT_FILE_VARIABLE in os.environ
        again = "; Ctrl-C again stops it now, unsaved" if can_stop_now and number in TERMINAL_SIGNALS else ""
        line_break = "\n" if sys.stderr.isatty() else ""  # to print below the progress bar
        # Not print: Python aborts a process that ends while another thread has the lock of stderr.
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"{line_break}distgpt: stopping after this step is saved{again}\n".encode())


def _end_process(code: int) -> NoReturn:
    """End the process now: a normal exit would join threads that wait for lost ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(code)
