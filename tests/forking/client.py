"""Start programs through a fork server, which starts with the first program. The workers of a test run share it."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# Space for the environment that /proc/PID/environ shows for a fork, see program._show_environment.
ENVIRONMENT_BYTES = 2**14


class Clock:
    """The CPU seconds of all programs that have ended."""

    seconds = 0.0


class Forked:
    """A program that the server has forked, with the methods of Popen that tests use."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers.makefile()
        self.pid = int(self._answers.readline())
        self._code: int | None = None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        if self._code is None:
            code, seconds = self._answers.readline().split()
            self._code = int(code)
            Clock.seconds += float(seconds)
        return self._code


class _Server:
    """The server process, and our end of the socket to it."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self.address = f"{tempfile.mkdtemp(prefix='distgpt-test-')}/server"
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The listener is made here, so that relays can connect before the server has finished its imports.
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.address)
        listener.listen()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "ROOM": " " * ENVIRONMENT_BYTES}
        with theirs, listener:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.forking.server",
                    str(theirs.fileno()),
                    str(listener.fileno()),
                    self.address,
                ],
                pass_fds=[theirs.fileno(), listener.fileno()],
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                env=variables,
            )
        atexit.register(self._stop)

    def start(self, request: str, streams: Sequence[int]) -> Forked:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._requests, [request.encode()], [*streams, theirs.fileno()])
        return Forked(ours)

    def _stop(self) -> None:
        if os.getpid() == self._owner:
            self._requests.shutdown(socket.SHUT_RDWR)
            self._process.wait()


_server: _Server | None = None
_starting = threading.Lock()


def server() -> _Server:
    """Return the server of this process, and start it if there is none."""
    global _server
    with _starting:
        _server = _server or _Server()
    return _server


def start(
    command: Sequence[str], *, env: Mapping[str, str], streams: tuple[int, int, int], core: int | None = None
) -> Forked:
    """Start `command`, a Python module or file, with these standard streams, on one core or on all."""
    cores = None if core is None else [core]
    request = {"command": list(command), "env": dict(env), "cwd": os.getcwd(), "cores": cores, "relay": None}
    return server().start(json.dumps(request), streams)
