"""Fork a process that has threads."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path


def fork() -> int:
    """Fork at a moment at which all other threads of this process sleep; return as os.fork does.

    A lock that another thread holds is never released in the child. So torchrun's store holds one of glibc's for a
    moment when a rank connects, and every getaddrinfo in a rank that is forked in that moment waits forever. Therefore
    the child waits until its parent has seen that no other thread ran during the fork. If one did, the parent kills the
    child and forks again.
    """
    while True:
        wait, go = os.pipe()
        before = _other_threads()
        pid = os.fork()
        if not pid:
            os.close(go)
            if not os.read(wait, 1):  # the parent has been killed
                os._exit(1)
            os.close(wait)
            return 0
        os.close(wait)
        slept = before == _other_threads() and all("\tS" in state for state in before.values())
        if slept:
            with suppress(BrokenPipeError):  # the child has been killed, which its exit code tells
                os.write(go, b"\n")
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(go)
        if slept:
            return pid


def _other_threads() -> dict[str, str]:
    """Return the state of each other thread, and how often it has been given or has left a core."""
    states = {}
    for thread in Path("/proc/self/task").iterdir():
        if thread.name != str(threading.get_native_id()):
            with suppress(OSError):  # it has ended meanwhile
                lines = (thread / "status").read_text().splitlines()
                states[thread.name] = " ".join(line for line in lines if line.startswith("State") or "ctxt" in line)
    return states
