"""Run torchrun as a child: pass a signal on once, and kill a torchrun that cannot end by itself."""

import math
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

from distgpt.errors import STOP_SIGNALS
from distgpt.files import children_of, process_stat
from distgpt.launch.policy import say
from distgpt.torchrun import signal_when_parent_dies

# A second Ctrl-C within this time is the echo of the first one, as a terminal and a wrapper may both send it.
ECHO_SECONDS = 2.0
# Seconds that torchrun has to end after it was told to end at once.
QUIT_SECONDS = 3.0
# The longest that torchrun may take to notice that all its ranks have ended.
NOTICE_SECONDS = 60


class Supervisor:
    r"""Runs one torchrun after another, and handles the signals that a person or a scheduler sends to the launcher.

    Only the first signal is passed on, as SIGTERM: after a second one torchrun breaks off the save. A Ctrl-C that is
    clearly typed again asks for that, and Ctrl-\ ends torchrun at once.
    """

    def __init__(self, *, timeout: float) -> None:
        self.signalled: signal.Signals | None = None
        self.ended_unsaved = False
        self._timeout = timeout
        self._signalled_at = 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._passed_on = False
        self._is_waiting = False
        for number in (*STOP_SIGNALS, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._handle)

    def run(
        self, command: Sequence[str], env: Mapping[str, str], *, while_waiting: Callable[[float], None] | None = None
    ) -> int:
        """Run a command and return its exit code. If the launcher is killed, the kernel sends the command SIGTERM.

        Until it has ranks, `while_waiting` gets the seconds since its start, once a second. It may raise to end it.
        """
        self._passed_on = False
        # In a process group of its own, since a terminal sends Ctrl-C to the whole group of the launcher.
        self._child = child = subprocess.Popen(
            command, env=env, process_group=0, preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM)
        )
        if self.signalled and not self._passed_on:  # the signal came before there was a child
            self._send(signal.SIGTERM)
        try:
            return self._wait(child, while_waiting)
        finally:
            if self._child is not None:  # something was raised here: no torchrun may go on alone
                child.kill()
                child.wait()
                self._child = None

    def _wait(self, child: subprocess.Popen[bytes], while_waiting: Callable[[float], None] | None) -> int:
        """Wait for the end of a child, and kill it if it cannot end by itself."""
        watch, began = RankWatch(self._timeout), time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=1)
                self._child = None
                return code if code >= 0 else 128 - code
            if limit := watch.limit_exceeded(rank_states(child.pid)):
                say(f"all ranks are gone or stopped for {limit} s: killing torchrun, which does not end by itself")
                child.kill()
            elif self.ended_unsaved and time.monotonic() > self._signalled_at + QUIT_SECONDS:
                # After a second signal torchrun waits for its ranks once more. They die with it.
                child.kill()
            elif while_waiting and not watch.had_ranks:
                while_waiting(time.monotonic() - began)

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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        typed_again = self.signalled and received == signal.SIGINT and now - self._signalled_at >= ECHO_SECONDS
        if received == signal.SIGQUIT or typed_again:
            self.signalled, self._signalled_at = self.signalled or received, now
            self.ended_unsaved = True
            self._send(signal.SIGQUIT)
        elif not self.signalled:
            self.signalled, self._signalled_at = received, now
            self._send(signal.SIGTERM)
        if self._is_waiting:
            raise KeyboardInterrupt

    def _send(self, number: signal.Signals) -> None:
        if self._child:
            self._passed_on = True
            with suppress(ProcessLookupError):
                self._child.send_signal(number)


class RankWatch:
    """Finds a torchrun that does not end by itself. It counts calls, one a second, so that suspended time is left out.

    A torchrun that the network cut off from the head waits for ever, and notices neither signals nor the end of its
    ranks. Ranks that are all stopped do not end when torchrun asks them to.
    """

    def __init__(self, timeout: float) -> None:
        self.had_ranks = False
        self._timeout = math.ceil(timeout)
        self._seconds = 0

    def limit_exceeded(self, states: Sequence[str]) -> int | None:
        """Return the limit in seconds, once all ranks were dead (Z in /proc) or stopped (T) for longer."""
        if set(states) - {"Z", "T"}:
            self.had_ranks, self._seconds = True, 0
            return None
        self.had_ranks = self.had_ranks or "T" in states  # ranks may be stopped before the first look
        if not self.had_ranks:
            return None
        limit = self._timeout if "T" in states else min(self._timeout, NOTICE_SECONDS)
        self._seconds += 1
        return limit if self._seconds > limit else None


def rank_states(agent: int) -> list[str]:
    """Return the states of the children of torchrun in /proc; none on systems without it."""
    states = []
    with suppress(OSError):
        for child in children_of(agent):
            with suppress(OSError):  # it has ended meanwhile
                states.append(process_stat(child)[0])
    return states
