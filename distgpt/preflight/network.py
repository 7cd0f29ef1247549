"""Routes and ports of this host. Imports no torch: launchers use it before they start any rank."""

import fcntl
import ipaddress
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distgpt.errors import Interrupted, UsageError

SIOCGIFADDR = 0x8915
ESTABLISHED = "01"  # a state in /proc/net/tcp
# An address outside of every network, reserved for documentation (RFC 5737). The kernel chooses a route to it, but
# nothing is sent there.
OUTSIDE_ADDRESS = "192.0.2.1"


@dataclass(frozen=True)
class Route:
    """The route to a host. `is_here`: that host is this one. `address`, `interface`: of this host, on the route."""

    is_here: bool
    address: str
    interface: str


def route_to(host: str) -> Route:
    """Return the address and interface that this host uses towards `host`. Raises UsageError if there is no route."""
    target = resolve(host)
    is_here = is_own_address(target)
    # Debian resolves a host's own name to 127.0.1.1, which other hosts cannot reach.
    is_own_name = is_here and ipaddress.ip_address(target).is_loopback and host not in (target, "localhost")
    address = _source_address(OUTSIDE_ADDRESS if is_own_name else target)
    return Route(is_here, address, interface_of(address))


def resolve(host: str) -> str:
    """Return the IPv4 address of a hostname. Raises UsageError if it has none."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise UsageError(
            f"cannot resolve {host} ({error.strerror}): add it to /etc/hosts or DNS, or give its IP address"
        ) from None


def interface_of(address: str) -> str:
    """Return the name of the interface that has this address. Raises UsageError."""
    for name, its_address in _interfaces():
        if its_address == address:
            return name
    raise UsageError(f"no interface of this host has the address {address}: set GLOO_SOCKET_IFNAME to the right one")


def first_address() -> str | None:
    """Return the first IPv4 address of this host that other hosts can use, None if there is none."""
    return next((address for _, address in _interfaces() if not ipaddress.ip_address(address).is_loopback), None)


def _interfaces() -> Iterator[tuple[str, str]]:
    """List the interfaces of this host that have an IPv4 address, each with its first one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
                yield name, socket.inet_ntoa(reply[20:24])


def connection_error(address: str, port: int, *, timeout: float) -> str | None:
    """Try a TCP connection. Return the error, None if it succeeds. `timeout` in seconds."""
    try:
        socket.create_connection((address, port), timeout=timeout).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def wait_for_port(host: str, ports: Sequence[int], *, seconds: float) -> int:
    """Wait until one of `ports` accepts a connection and return it. Raises Interrupted after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        for port in ports:
            if connection_error(host, port, timeout=2) is None:
                return port
        if time.monotonic() > deadline:
            raise Interrupted(f"{host}:{ports[0]} did not answer for {seconds:.0f} s: start the same command on {host}")
        time.sleep(0.2)


def connected_hosts(port: int) -> list[str]:
    """Return the IPv4 addresses of the other hosts that are connected to this port of this host."""
    addresses = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
        except OSError:  # this system has no IPv6, or no /proc
            continue
        for line in lines:
            _, local, remote, state, *_ = line.split()
            if int(local.rpartition(":")[2], 16) == port and state == ESTABLISHED:
                # The last 32 bits of an IPv6 address: they hold the IPv4 address of a client that uses IPv4.
                addresses.add(socket.inet_ntoa(struct.pack("=I", int(remote.partition(":")[0][-8:], 16))))
    return sorted(address for address in addresses if not is_own_address(address))


def is_own_address(address: str) -> bool:
    """Return whether an IPv4 address is one of this host."""
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
