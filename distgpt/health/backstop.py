"""End a rank whose watchdog has stopped: `backstop.py LOGS SIGNAL`, a child of the rank.

SIGNAL, a number, makes the rank write the stacks of all its threads to its log, even while it hangs. This file imports
nothing of distgpt, so that it starts quickly.

If a rank hangs while it holds Python's lock (the GIL), none of its threads can run, nor can its watchdog. So this is a
separate process. A timer of the kernel would not do: it would run out while a job is suspended.
"""

import math
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

TICK = 1.0  # seconds
# Seconds beyond the limit, in which a watchdog that can run ends its rank by itself.
GRACE_SECONDS = 10.0
# Seconds that a rank gets to write its stacks.
STACK_DUMP_SECONDS = 0.5


def wait_for_missed_heartbeat(rank: int) -> float | None:
    """Wait until the watchdog of a rank is silent for too long. Returns the seconds of silence, None if the rank ends.

    The watchdog writes its limit, in seconds, to stdin twice a second.
    """
    silent, limit = 0.0, math.inf
    while silent <= limit + GRACE_SECONDS:
        if select.select([0], [], [], TICK)[0]:
            limits = os.read(0, 2**16).split()
            if not limits:
                return None
            silent, limit = 0.0, float(limits[-1])
        elif state_of(rank) not in "TtX":
            silent += TICK  # not by the clock: time for which both processes are suspended does not count
        if os.getppid() != rank:
            return None
    return silent


def state_of(pid: int) -> str:
    """Return the state in /proc/PID/stat: T if a signal has stopped the process, t if a debugger has, X if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def main(logs: str, stacks_signal: int) -> None:
    """Wait while the rank runs, and end it if its watchdog stops."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the rank saves first, and is still watched meanwhile
    rank = os.getppid()
    silent = wait_for_missed_heartbeat(rank)
    if silent is None:
        return
    with suppress(ProcessLookupError):
        os.kill(rank, stacks_signal)  # its handler, in C, does not need the lock
        time.sleep(STACK_DUMP_SECONDS)
        os.kill(rank, signal.SIGKILL)
    name = os.environ.get("RANK", "0")
    stacks = f"; its stacks are in {logs}" if Path(logs, f"rank-{name}.log").exists() else ""
    with suppress(OSError):  # stderr may be closed
        print(
            f"distgpt: no progress for {silent:.0f} s: rank {name} (pid {rank} on {socket.gethostname()}) hangs while "
            f"it holds Python's lock{stacks}: run it again to go on",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
