"""torchrun as a child: it is told once of a signal to stop, and killed where it cannot end by itself."""

import ctypes
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from distgpt.errors import STOP_SIGNALS
from distgpt.files import process_stat
from distgpt.launch.policy import say
from distgpt.torchrun import PR_SET_PDEATHSIG

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# A second Ctrl-C within this time is the echo of the first one, as a terminal and a wrapper may both send it.
ECHO_SECONDS = 2.0
# torchrun has so many seconds to end at once.
QUIT_SECONDS = 3.0
# The longest that torchrun may take to notice that all its ranks have ended.
NOTICE_SECONDS = 60


class Supervisor:
    """Runs one torchrun after the other, and answers the signals that a person or a scheduler sends to the launcher.

    The first signal is passed on as SIGTERM, and no other: told twice, torchrun breaks off what it does about it, and
    the save with it. A Ctrl-C that is clearly typed again asks for that, and Ctrl-\\ ends torchrun at once.
    """

    def __init__(self, *, timeout: float) -> None:
        self.signalled: signal.Signals | None = None
        self.ended_unsaved = False
        self._timeout = timeout
        self._signalled_at = 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._child_is_told = False
        self._is_waiting = False
        for number in (*STOP_SIGNALS, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._answer)

    def run(
        self, command: Sequence[str], env: Mapping[str, str], *, give_up: Callable[[float], bool] | None = None
    ) -> int:
        """Run a command to its end; return its exit code.

        `give_up` is asked once a second, as long as it never had a rank, whether to end it after so many seconds.
        """
        self._child_is_told = False
        self._child = child = start(command, env)
        if self.signalled and not self._child_is_told:  # told to stop when there was nothing yet to pass it on to
            self._tell(signal.SIGTERM)
        watch, began = RankWatch(self._timeout), time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=1)
                self._child = None
                return code if code >= 0 else 128 - code
            if overdue := watch.overdue(rank_states(child.pid)):
                say(f"all ranks are gone or stopped since {overdue} s: killing torchrun, which does not end by itself")
                child.kill()
            elif self.ended_unsaved and time.monotonic() > self._signalled_at + QUIT_SECONDS:
                # Told of a second signal, torchrun breaks off what it did about the first, and then waits for its ranks
                # once more. They die with it.
                child.kill()
            elif give_up and not watch.had_ranks and give_up(time.monotonic() - began):
                child.kill()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Raise KeyboardInterrupt inside at a signal, or at once after one: there is no run to be saved."""
        self._is_waiting = True
        try:
            if self.signalled:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_waiting = False

    def _answer(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        typed_again = self.signalled and received == signal.SIGINT and now - self._signalled_at >= ECHO_SECONDS
        if received == signal.SIGQUIT or typed_again:
            self.signalled, self._signalled_at = self.signalled or received, now
            self.ended_unsaved = True
            self._tell(signal.SIGQUIT)
        elif not self.signalled:
            self.signalled, self._signalled_at = received, now
            self._tell(signal.SIGTERM)
        if self._is_waiting:
            raise KeyboardInterrupt

    def _tell(self, number: signal.Signals) -> None:
        if self._child:
            self._child_is_told = True
            with suppress(ProcessLookupError):
                self._child.send_signal(number)


class RankWatch:
    """Notices a torchrun that does not end by itself. It is asked once a second, so that time asleep does not count.

    A torchrun that the network cut off from the head waits for its answer for ever, and notices neither signals nor
    the end of its ranks. Nor do ranks that are all stopped end when it tells them to.
    """

    def __init__(self, timeout: float) -> None:
        self.had_ranks = False
        self._timeout = math.ceil(timeout)
        self._seconds = 0

    def overdue(self, states: Sequence[str]) -> int | None:
        """Return the limit in seconds, once no rank was in a state of /proc but dead (Z) and stopped (T) for longer."""
        if set(states) - {"Z", "T"}:
            self.had_ranks, self._seconds = True, 0
            return None
        if not self.had_ranks:
            return None
        limit = self._timeout if "T" in states else min(self._timeout, NOTICE_SECONDS)
        self._seconds += 1
        return limit if self._seconds > limit else None


def start(command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, since a terminal sends Ctrl-C to all of the launcher's.

    If the launcher is killed, the command is told to save and end.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent() -> None:
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return subprocess.Popen(command, env=env, process_group=0, preexec_fn=end_with_parent)


def rank_states(agent: int) -> list[str]:
    """Return the states of torchrun's children, as /proc has them; none where it does not tell."""
    states = []
    with suppress(OSError):
        for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            with suppress(OSError):  # it has ended meanwhile
                states.append(process_stat(int(child))[0])
    return states
