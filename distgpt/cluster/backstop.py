"""Ends a rank whose watchdog fell silent: `backstop.py LOGS`, a child of the rank that imports nothing of distgpt.

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
from pathlib import Path

TICK = 1.0  # seconds
# Seconds beyond the limit, in which a watchdog that can do so ends its rank by itself.
MORE = 10.0
WRITING = 0.5


def silence_of(rank: int) -> float | None:
    """The seconds for which the watchdog of this process said nothing, once they are too many; None if it has ended.

    It writes its limit to stdin twice a second.
    """
    silent, limit = 0.0, math.inf
    while silent <= limit + MORE:
        if select.select([0], [], [], TICK)[0]:
            said = os.read(0, 2**16).split()
            if not said:
                return None
            silent, limit = 0.0, float(said[-1])
        elif state_of(rank) != "T":
            silent += TICK  # counted, not by the clock: what is suspended with the rank does not count either
        if os.getppid() != rank:
            return None
    return silent


def state_of(pid: int) -> str:
    """As in /proc/PID/stat: T is stopped by a signal."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def main(logs: str) -> None:
    """Wait beside the rank, and end it if need be."""
    rank = os.getppid()
    silent = silence_of(rank)
    if silent is None:
        return
    who = f"rank {os.environ.get('RANK', '0')} (pid {rank} on {socket.gethostname()})"
    cause = f"no progress for {silent:.0f} s: {who} hangs with Python's lock held; its stacks are in {logs}"
    print(f"distgpt: {cause}: run it again to go on", file=sys.stderr)
    os.kill(rank, signal.SIGUSR2)  # has it write its stacks, for which it needs no lock
    time.sleep(WRITING)
    os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
