"""How this host reaches the others, told without torch: launchers ask before they start anything."""

import fcntl
import ipaddress
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distgpt.errors import Interrupted, UsageError

SIOCGIFADDR = 0x8915
ESTABLISHED = "01"  # a state in /proc/net/tcp
# Documentation's own network (RFC 5737): nothing is sent to it, it only makes the kernel choose a route.
SOMEWHERE = "192.0.2.1"


@dataclass(frozen=True)
class Route:
    """From this host to another one. `is_here`: that other one is this host."""

    is_here: bool
    address: str
    interface: str


def route_to(host: str) -> Route:
    """The address that the others see of this host, and its interface. Raises UsageError."""
    target = resolve(host)
    here = _is_ours(target)
    # Debian gives a host's own name the address 127.0.1.1, at which nobody else finds it.
    named = here and ipaddress.ip_address(target).is_loopback and host != target and host != "localhost"
    address = _source_address(SOMEWHERE if named else target)
    return Route(here, address, interface_of(address))


def resolve(host: str) -> str:
    """The IPv4 address of a name. Raises UsageError."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UsageError(
            f"{host} has no address here ({error.strerror}): put it into /etc/hosts or DNS, or give its IP address"
        ) from None


def interface_of(address: str) -> str:
    """The name of the interface that has this address. Raises UsageError."""
    for name, its_address in _interfaces():
        if its_address == address:
            return name
    raise UsageError(f"no interface of this host has the address {address}: set GLOO_SOCKET_IFNAME to the right one")


def first_address() -> str | None:
    """The first IPv4 address of this host that is not for itself alone, None if it has none."""
    return next((address for _, address in _interfaces() if not ipaddress.ip_address(address).is_loopback), None)


def _interfaces() -> Iterator[tuple[str, str]]:
    """The interfaces of this host that have an IPv4 address, each with its first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                yield name, socket.inet_ntoa(reply[20:24])


def can_connect(address: str, port: int, *, timeout: float) -> str | None:
    """None if a TCP connection can be made, else why not; `timeout` in seconds."""
    try:
        socket.create_connection((address, port), timeout=timeout).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def wait_for_port(host: str, ports: list[int], *, seconds: float) -> int:
    """The first of `ports` that answers. Raises Interrupted if none does for so long."""
    deadline = time.monotonic() + seconds
    while True:
        for port in ports:
            if can_connect(host, port, timeout=2) is None:
                return port
        if time.monotonic() > deadline:
            raise Interrupted(f"{host}:{ports[0]} did not answer for {seconds:.0f} s: start the same command there")
        time.sleep(0.2)


def guests(port: int) -> list[str]:
    """The IPv4 addresses of other hosts that are connected to this port of ours."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, state, *_ = line.split()
            if int(local.rpartition(":")[2], 16) == port and state == ESTABLISHED:
                # Of IPv6, the last 32 bits: IPv4 in its clothes.
                found.add(socket.inet_ntoa(struct.pack("=I", int(remote.partition(":")[0][-8:], 16))))
    return sorted(address for address in found if not _is_ours(address))


def _is_ours(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _source_address(target: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # UDP: no packet is sent
        except OSError as error:
            raise UsageError(f"this host has no route to {target}: {error.strerror}") from None
        address: str = probe.getsockname()[0]
        return address
