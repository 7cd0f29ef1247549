"""Fork programs for a test process and for scripts that it starts: `python -m tests.forking.server FD LISTENER`.

FD is a socket to the test process, LISTENER one to which relays connect. A request is one message: JSON with the
command, its variables, directory and cores, and four file descriptors: the standard streams, and a socket for the
answers. These are a line with the process id, then one with the exit code and the CPU seconds that it took. A program
that is forked for a relay (relay.py) runs in the namespaces of that process, and is killed when the relay is gone.
"""

import ctypes
import gc
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.forking import children, program, threads

LONGEST_REQUEST = 2**17


@dataclass(eq=False)
class Child:
    """A program that runs, and the socket to the process that asked for it."""

    pid: int
    pidfd: int
    answers: socket.socket
    relayed: bool


class Server:
    """Serves requests until the test process closes its socket."""

    def __init__(self, requests: socket.socket, listener: socket.socket) -> None:
        self._requests, self._listener = requests, listener
        self._selector = selectors.DefaultSelector()
        for connection in (requests, self._listener):
            self._selector.register(connection, selectors.EVENT_READ)
        self._children: list[Child] = []
        self._seconds = 0.0  # CPU seconds of relayed programs that were not yet reported

    def serve(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._requests:
                        if not self._fork(self._requests):
                            return
                    elif key.fileobj is self._listener:
                        with self._listener.accept()[0] as relay:
                            self._fork(relay)
                    elif key.data not in self._children:
                        pass  # its end was handled in this round
                    elif key.fd == key.data.pidfd:
                        self._reap(key.data)
                    else:  # the relay is gone
                        self._selector.unregister(key.fileobj)
                        os.kill(key.data.pid, signal.SIGKILL)
        finally:
            for child in self._children:
                if child.relayed:
                    os.kill(child.pid, signal.SIGKILL)
            # Not in the test process, which may be killed.
            shutil.rmtree(os.path.dirname(self._listener.getsockname()))

    def _fork(self, requests: socket.socket) -> bool:
        message, received, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 4)
        if not message:
            return False
        request = json.loads(message)
        *streams, answers = received
        pid = fork(request, streams)
        for stream in streams:
            os.close(stream)
        child = Child(pid, os.pidfd_open(pid), socket.socket(fileno=answers), request["relay"] is not None)
        self._children.append(child)
        self._tell(child, f"{pid}")
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        if child.relayed:
            self._selector.register(child.answers, selectors.EVENT_READ, child)
        return True

    def _reap(self, child: Child) -> None:
        self._children.remove(child)
        self._selector.unregister(child.pidfd)
        with suppress(KeyError):
            self._selector.unregister(child.answers)
        os.close(child.pidfd)
        _, status, used = os.wait4(child.pid, 0)
        self._seconds += used.ru_utime + used.ru_stime
        self._tell(child, f"{os.waitstatus_to_exitcode(status)} {self._seconds}")
        if not child.relayed:
            self._seconds = 0.0
        child.answers.close()

    def _tell(self, child: Child, line: str) -> None:
        with suppress(BrokenPipeError):  # the other end may be closed
            child.answers.send(f"{line}\n".encode())


def fork(request: dict[str, Any], streams: list[int]) -> int:
    """Fork a process that runs a program; return its process id."""
    pid = threads.fork_while_others_sleep()
    if pid:
        return pid
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        if request["relay"] is not None:
            os.setpgid(0, 0)
            enter_namespaces(request["relay"])
        if request["cores"] is not None:
            os.sched_setaffinity(0, request["cores"])
        children.fork_children(request["command"])
        program.run(request["command"], env=request["env"], cwd=request["cwd"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(70)


def enter_namespaces(pid: int) -> None:
    """Enter the namespaces of a process: its host name, network and mounts."""
    other = [name for name in ("uts", "net", "mnt") if _namespace("self", name) != _namespace(str(pid), name)]
    descriptors = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in other]
    libc = ctypes.CDLL(None, use_errno=True)
    for descriptor in descriptors:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), "setns")


def _namespace(pid: str, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")


if __name__ == "__main__":
    program.import_packages()
    gc.freeze()  # otherwise a collection in a fork visits all objects of torch, and copies their pages
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    Server(*(socket.socket(fileno=int(fd)) for fd in sys.argv[1:3])).serve()
