"""Forks programs for a test process: `python -m tests.forking.server FD`, a socket to it.

A request is one message: JSON with the command, its variables, directory and core, and four file descriptors: the
standard streams, and a socket for the answers: a line with the process id, then one with the exit code and the CPU
seconds that it took.
"""

import json
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from tests.forking import program, ranks

LONGEST_REQUEST = 2**17


def fork(request: dict[str, Any], streams: list[int]) -> int:
    """Start a program; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        if request["core"] is not None:
            os.sched_setaffinity(0, {request["core"]})
        if "torch.distributed.run" in request["command"]:
            ranks.fork_ranks()
        program.run(request["command"], env=request["env"], cwd=request["cwd"])
    finally:
        os._exit(70)


def main(requests: socket.socket) -> None:
    """Serve until the test process closes its end."""
    program.import_packages()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is requests:
                message, received, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 4)
                if not message:
                    return
                *streams, answers = received
                answer = socket.socket(fileno=answers)
                pid = fork(json.loads(message), streams)
                for stream in streams:
                    os.close(stream)
                answer.send(f"{pid}\n".encode())
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, answer))
            else:
                pid, answer = key.data
                selector.unregister(key.fileobj)
                os.close(key.fd)
                _, status, used = os.wait4(pid, 0)
                with answer, suppress(BrokenPipeError):  # the test may have left
                    answer.send(f"{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}\n".encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
