"""Fork a process that has threads."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path


def fork_while_others_sleep() -> int:
    """Fork at a moment at which all other threads of this process sleep; return as os.fork does.

    A lock that another thread holds is never released in the child. An example: when a rank connects, the thread of
    torchrun's store holds a lock of glibc for a moment. In a rank that is forked in that moment, getaddrinfo would wait
    forever. Therefore the child waits until its parent has seen that no other thread ran during the fork. If one did,
    the parent kills the child and forks again.
    """
    while True:
        may_start, start = os.pipe()
        before = _other_threads()
        pid = os.fork()
        if not pid:
            os.close(start)
            if not os.read(may_start, 1):  # the parent has been killed
                os._exit(1)
            os.close(may_start)
            return 0
        os.close(may_start)
        if before == _other_threads() and all("\tS" in state for state in before.values()):
            with suppress(BrokenPipeError):  # somebody has killed the child: its exit code says so
                os.write(start, b"\n")
            os.close(start)
            return pid
        os.close(start)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _other_threads() -> dict[str, str]:
    """Return the state of each other thread, and how often it has left a core."""
    states = {}
    for thread in Path("/proc/self/task").iterdir():
        if thread.name != str(threading.get_native_id()):
            with suppress(OSError):  # it has ended meanwhile
                lines = (thread / "status").read_text().splitlines()
                states[thread.name] = " ".join(line for line in lines if line.startswith("State") or "ctxt" in line)
    return states
