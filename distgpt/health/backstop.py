"""End a rank whose watchdog fell silent: `backstop.py LOGS SIGNAL`, a child of the rank.

SIGNAL, a number, makes the rank write the stacks of all its threads to its log, whatever it does. The file imports
nothing of distgpt, so that it starts at once.

All threads of a process that hangs while it holds Python's lock stand still, its watchdog too. So this is a process of
its own. Nor is it a timer of the kernel's, which would run out while a job is suspended and end it when it goes on.
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
# Seconds beyond the limit, in which a watchdog that can do so ends its rank by itself.
GRACE_SECONDS = 10.0
# Seconds that a rank gets to write its stacks.
STACK_DUMP_SECONDS = 0.5


def wait_for_missed_heartbeat(rank: int) -> float | None:
    """Wait until the watchdog of the rank was silent for too long, and return for how many seconds; None if it ended.

    The watchdog writes its limit, in seconds, to stdin twice a second.
    """
    silent, limit = 0.0, math.inf
    while silent <= limit + GRACE_SECONDS:
        if select.select([0], [], [], TICK)[0]:
            said = os.read(0, 2**16).split()
            if not said:
                return None
            silent, limit = 0.0, float(said[-1])
        elif state_of(rank) not in "TtX":
            silent += TICK  # counted, not by the clock: what is suspended with the rank does not count either
        if os.getppid() != rank:
            return None
    return silent


def state_of(pid: int) -> str:
    """As in /proc/PID/stat: T is stopped by a signal, t by a debugger. X where that cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def main(logs: str, stacks_signal: int) -> None:
    """Wait beside the rank, and end it if need be."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # what stops the rank has it save first
    rank = os.getppid()
    silent = wait_for_missed_heartbeat(rank)
    if silent is None:
        return
    with suppress(ProcessLookupError):
        os.kill(rank, stacks_signal)  # it needs no lock for that
        time.sleep(STACK_DUMP_SECONDS)
        os.kill(rank, signal.SIGKILL)
    name = os.environ.get("RANK", "0")
    stacks = f"; its stacks are in {logs}" if Path(logs, f"rank-{name}.log").exists() else ""
    with suppress(OSError):  # nobody may hear it
        print(
            f"distgpt: no progress for {silent:.0f} s: rank {name} (pid {rank} on {socket.gethostname()}) hangs with "
            f"Python's lock held{stacks}: run it again to go on",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
