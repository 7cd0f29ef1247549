"""Run torchrun as a child process: pass a signal on once, and kill a torchrun that does not end by itself."""

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

# A second Ctrl-C within this time is a copy of the first one: a terminal and a wrapper may both send it.
ECHO_SECONDS = 2.0
# torchrun has this many seconds to end after SIGQUIT.
QUIT_SECONDS = 3.0
# torchrun has this many seconds to notice that all its ranks have ended.
MAX_NOTICE_SECONDS = 60


class Supervisor:
    r"""Runs one torchrun after another, and handles the signals that a person or a scheduler sends to the launcher.

    Only the first signal is passed on, as SIGTERM: with more of them torchrun ends before its ranks have saved. A
    second Ctrl-C, if it is not a copy of the first one, and Ctrl-\ end torchrun at once, without a save.
    """

    def __init__(self, *, timeout: float) -> None:
        self.signalled: signal.Signals | None = None
        self.ended_unsaved = False
        self._timeout = timeout
        self._signalled_at = 0.0
        self._child: subprocess.Popen[bytes] | None = None
        self._passed_on = False
        self._is_interruptible = False
        for number in (*STOP_SIGNALS, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._handle)

    def run(
        self, command: Sequence[str], env: Mapping[str, str], *, while_joining: Callable[[float], None] | None = None
    ) -> int:
        """Run torchrun and return its exit code. If the launcher is killed, the kernel sends torchrun SIGTERM.

        Until torchrun has ranks, `while_joining` is called once a second with the seconds since the start. If it raises
        an exception, torchrun is killed.
        """
        self._passed_on = False
        # In its own process group, since a terminal sends Ctrl-C to all processes of the launcher's group.
        self._child = child = subprocess.Popen(
            command, env=env, process_group=0, preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM)
        )
        if self.signalled and not self._passed_on:  # the signal came before the child was started
            self._send(signal.SIGTERM)
        try:
            return self._wait(child, while_joining)
        finally:
            if self._child is not None:  # an exception ended the wait, and torchrun must not go on alone
                child.kill()
                child.wait()
                self._child = None

    def _wait(self, child: subprocess.Popen[bytes], while_joining: Callable[[float], None] | None) -> int:
        """Wait for the end of torchrun, and kill it if it does not end by itself."""
        watch, started = RankWatch(self._timeout), time.monotonic()
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=1)
                self._child = None
                return code if code >= 0 else 128 - code
            if limit := watch.limit_exceeded(rank_states(child.pid)):
                say(f"all ranks have been gone or stopped for {limit} s: killing torchrun, which does not end itself")
                child.kill()
            elif self.ended_unsaved and time.monotonic() > self._signalled_at + QUIT_SECONDS:
                # torchrun waits for its ranks even after SIGQUIT. They die with it.
                child.kill()
            elif while_joining and not watch.had_ranks:
                while_joining(time.monotonic() - started)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal, also one that came before, raise KeyboardInterrupt inside. For waits while no torchrun runs."""
        self._is_interruptible = True
        try:
            if self.signalled:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        is_second_ctrl_c = self.signalled and received == signal.SIGINT and now - self._signalled_at >= ECHO_SECONDS
        if received == signal.SIGQUIT or is_second_ctrl_c:
            self.signalled, self._signalled_at = self.signalled or received, now
            self.ended_unsaved = True
            self._send(signal.SIGQUIT)
        elif not self.signalled:
            self.signalled, self._signalled_at = received, now
            self._send(signal.SIGTERM)
        if self._is_interruptible:
            raise KeyboardInterrupt

    def _send(self, number: signal.Signals) -> None:
        if self._child:
            self._passed_on = True
            with suppress(ProcessLookupError):
                self._child.send_signal(number)


class RankWatch:
    """Finds a torchrun that does not end by itself.

    A torchrun that lost its connection to the head waits forever, and notices neither signals nor the end of its ranks.
    Ranks that are all stopped (SIGSTOP) do not end when torchrun asks them to. Time is counted in calls, one a second,
    so that time in which this process itself was suspended does not count.
    """

    def __init__(self, timeout: float) -> None:
        self.had_ranks = False
        self._timeout = math.ceil(timeout)
        self._seconds = 0

    def limit_exceeded(self, states: Sequence[str]) -> int | None:
        """Return the limit in seconds once all ranks were dead (Z in /proc) or stopped (T) for longer, else None."""
        if set(states) - {"Z", "T"}:
            self.had_ranks, self._seconds = True, 0
            return None
        self.had_ranks = self.had_ranks or "T" in states  # ranks may have been stopped before the first call
        if not self.had_ranks:
            return None
        limit = self._timeout if "T" in states else min(self._timeout, MAX_NOTICE_SECONDS)
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
