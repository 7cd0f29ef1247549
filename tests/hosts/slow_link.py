"""A link with a low rate and a long delay: two TAP devices, and this process between them.

    python slow_link.py NAMESPACE DEVICE NAMESPACE DEVICE BYTES_PER_SECOND SECONDS

In each direction, a frame waits until those before it have passed at that rate, and then for the delay. Prints "up"
when both devices exist. tc's netem does the same, but not every kernel has it.
"""

import ctypes
import errno
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

CLONE_NEWNET = 0x40000000  # sched.h
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
LONGEST_FRAME = 65536
# As a switch, drop frames when more than this waits: several times the bytes in flight on such a link.
BUFFER_BYTES = 4 * 2**20


class Direction:
    """Frames on their direction from one device to the other."""

    def __init__(self, source: int, target: int, *, rate: float, delay: float) -> None:
        self.source, self._target = source, target
        self._rate, self._delay = rate, delay
        self._free = 0.0  # the time at which the last frame will have passed
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._bytes = 0

    def take(self) -> None:
        """Receive a frame from the source."""
        frame = os.read(self.source, LONGEST_FRAME)
        if self._bytes + len(frame) > BUFFER_BYTES:
            return
        self._free = max(self._free, time.monotonic()) + len(frame) / self._rate
        self._waiting.append((self._free + self._delay, frame))
        self._bytes += len(frame)

    def deliver(self) -> float:
        """Send the frames that are due to the target; return the seconds until the next one is."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, frame = self._waiting.popleft()
            self._bytes -= len(frame)
            try:
                os.write(self._target, frame)
            except OSError as error:
                if error.errno != errno.EIO:  # the device is not up yet: the frame is lost
                    raise
        return max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else 1.0


def tap(space: str, name: str) -> int:
    """Enter a network namespace and make a TAP device there; return its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{space}") as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {space}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return device


def main(space_a: str, name_a: str, space_b: str, name_b: str, rate: str, delay: str) -> None:
    a, b = tap(space_a, name_a), tap(space_b, name_b)
    directions = [Direction(s, t, rate=float(rate), delay=float(delay)) for s, t in ((a, b), (b, a))]
    print("up", flush=True)
    while True:
        pause = min(direction.deliver() for direction in directions)
        readable, _, _ = select.select([direction.source for direction in directions], [], [], pause)
        for direction in directions:
            if direction.source in readable:
                direction.take()


if __name__ == "__main__":
    main(*sys.argv[1:])
