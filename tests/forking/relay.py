"""Replaces torchrun, or a launcher, in scripts under test.

The real program is forked by the test server, which already has torch imported, and runs in this process's namespaces
and on its cores. This process forwards signals and returns the exit code; if it is killed, the program is killed too.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# A variable of the program and its children: the process id of the relay.
RELAY = "FORKED_FOR"


def relay(server: str, command: Sequence[str]) -> NoReturn:
    """Have the server run `command`, a module or torchrun and its arguments, and end with its exit code."""
    module = "torch.distributed.run" if command[0].endswith("/torchrun") else command[0]
    forked, early = 0, list[int]()

    def pass_on(number: int, _: Any = None) -> None:
        if not forked:
            early.append(number)
            return
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(forked, number)

    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    ours, theirs = socket.socketpair()
    request = {
        "command": [sys.executable, "-m", module, *command[1:]],
        "env": {**os.environ, RELAY: str(os.getpid())},
        "cwd": os.getcwd(),
        "cores": sorted(os.sched_getaffinity(0)),
        "relay": os.getpid(),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, theirs:
        connection.connect(server)
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2, theirs.fileno()])
    answers = ours.makefile()
    forked = int(answers.readline())
    for missed in early:
        pass_on(missed)
    code = int(answers.readline().split()[0])
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
