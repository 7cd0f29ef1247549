"""Starts programs through the server of this test process, which is started for the first one."""

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
# The longest environment that a fork can show.
ROOM = 2**14


class Clock:
    """Counts the CPU seconds of the programs that have ended."""

    seconds = 0.0


class Forked:
    """A program that the server has forked, with what tests use of a Popen."""

    def __init__(self, answers: socket.socket) -> None:
        self._answers = answers.makefile()
        self.pid = int(self._answers.readline())
        self._code: int | None = None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        if self._code is None:
            code, seconds = self._answers.readline().split()
            self._code = int(code)
            Clock.seconds += float(seconds)
        return self._code


class _Server:
    """The server and this end of the socket to it."""

    def __init__(self) -> None:
        self.address = f"{tempfile.mkdtemp(prefix='distgpt-test-')}/server"
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Here, so that others can connect before the server has imported all.
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self.address)
        listener.listen()
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "ROOM": " " * ROOM}
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
        self._requests.close()
        self._process.wait()


_server: _Server | None = None
_starting = threading.Lock()


def server() -> _Server:
    """The one of this process."""
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
