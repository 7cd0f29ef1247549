"""Run torchrun as a child: pass a signal on once, and end a torchrun that cannot end by itself."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from distgpt.errors import STOP_SIGNALS
from distgpt.files import process_stat
from distgpt.launch.policy import say
from distgpt.torchrun import PR_SET_PDEATHSIG

# A Ctrl-C that comes so many seconds after the first one is a second one, and no echo of a wrapper.
ECHO_SECONDS = 2.0
# Seconds between two looks at the ranks of an agent, and without any rank until the agent is killed.
LOOK_SECONDS, NO_RANKS_SECONDS = 1.0, 60
TORCHRUN = (
    str(Path(sys.executable).with_name("torchrun")),
    # torchrun passes on only the signals that it is told of, and SIGUSR1 would kill it.
    "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
)


class Supervisor:
    """Runs one command after another. A signal to this process stops the command under way, with a save."""

    def __init__(self) -> None:
        """Handle signals from now on, but not those that are ignored, as under nohup."""
        self.signalled: str | None = None  # the first signal that asked to stop
        self._first, self._passed_on = 0.0, False
        self._child: subprocess.Popen[bytes] | None = None
        for number in (*STOP_SIGNALS, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._pass_on)

    def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stopped_limit: float,
        give_up: Callable[[float], str | None] = lambda seconds: None,
    ) -> int:
        """Run a command that starts ranks, and return its exit code.

        It is killed if all its ranks are stopped for `stopped_limit` seconds, or gone for a while: a torchrun that the
        network cut off waits for ever, and notices neither signals nor the end of its ranks. While it has no ranks yet,
        `give_up` gets the seconds since the start, and returns the reason to kill it, if there is one.
        """
        # In a process group of its own, since a terminal sends Ctrl-C to all of this one.
        self._passed_on = False
        variables = {**os.environ, **(environment or {})}
        child = subprocess.Popen(command, env=variables, process_group=0, preexec_fn=_terminate_with_parent)
        self._child = child
        if self.signalled and not self._passed_on:  # the signal came before there was a child
            self._send(signal.SIGTERM)
        started, had_ranks, idle_looks = time.monotonic(), False, 0
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(LOOK_SECONDS)
                self._child = None
                return code
            states = states_of_children(child.pid)
            if any(state not in "ZT" for state in states):
                had_ranks, idle_looks = True, 0
            elif had_ranks or "T" in states:
                had_ranks, idle_looks = True, idle_looks + 1
                limit = stopped_limit if "T" in states else min(stopped_limit, NO_RANKS_SECONDS)
                # Counted, not by the clock: this process may have been suspended, too.
                if idle_looks * LOOK_SECONDS > limit:
                    lasting = f"all ranks are gone or stopped since {limit:.0f} s"
                    say(f"{lasting}: killing torchrun, which does not end by itself")
                    self._send(signal.SIGKILL)
            elif reason := give_up(time.monotonic() - started):
                say(reason)
                self._send(signal.SIGKILL)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Pass on the first signal alone: torchrun breaks off the save if it gets a second one.

        A Ctrl-C that is clearly typed again asks for that, as does Ctrl-backslash.
        """
        if number == signal.SIGQUIT:
            self.signalled = self.signalled or "QUIT"
            self._send(signal.SIGQUIT)
        elif not self.signalled:
            self.signalled, self._first = signal.Signals(number).name.removeprefix("SIG"), time.monotonic()
            self._send(signal.SIGTERM)
        elif number == signal.SIGINT and time.monotonic() - self._first >= ECHO_SECONDS:
            self._send(signal.SIGQUIT)

    def _send(self, number: signal.Signals) -> None:
        if self._child is not None:
            self._passed_on = True
            self._child.send_signal(number)


def states_of_children(pid: int) -> list[str]:
    """Return the states in /proc of the children of a process: Z is dead, T is stopped."""
    states = []
    with suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with suppress(OSError):
                states.append(process_stat(int(child))[0])
    return states


def _terminate_with_parent() -> None:
    """Let the kernel send this child SIGTERM when its parent is killed, so that it saves and ends."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
