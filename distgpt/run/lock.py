"""Who may write to a run directory: a lock, a lease, and a fencing number that grows with each owner.

LOCK is held by an exclusive flock, which the kernel drops at any death, and says who holds it. Where locks do not reach
from host to host, or outlive a host that died, the lease decides: the owner changes LOCK every RENEWAL seconds, and one
that another host has not changed for LEASE seconds is given up. Clocks of two hosts are never compared.

An owner that was only asleep wakes up as one of two. So each has a LOCK file of its own, put in place by rename, and
looks before every write whether it is still the one in place; what it writes in several steps lies in a directory named
after it, which the next owner removes before it starts.

Imports no torch: a locked or read-only directory is found before anything heavy is loaded.
"""

import errno
import fcntl
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distgpt.errors import DirectoryError, StorageError
from distgpt.run.paths import RunPaths
from distgpt.torchrun import this_attempt, this_job

RENEWAL, LEASE = 2.0, 10.0  # seconds
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STAGED = (".LOCK.*.tmp", ".staged.*.tmp", "plots/.staged.*.tmp", "tb/.staged.*.tmp", "config.toml.*.tmp")
RECORD_BYTES = 512  # always the same, so that a renewal neither grows nor shortens the file


@dataclass(frozen=True)
class Owner:
    """A process that took a run directory. `boot` tells kernels apart: within one, a flock is the whole truth.

    `job`: what its torchrun has in common with no other. `attempt`: how often that had started all ranks again.
    """

    fence: int
    host: str
    boot: str
    pid: int
    started: str
    job: str | None = None
    attempt: int = 0

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.started}"

    @property
    def label(self) -> str:
        """A name that no other owner of this directory has, for files."""
        return f"{self.fence:06d}-{self.host}-{self.pid}"


@dataclass(frozen=True)
class _Record:
    """What LOCK says. `beat` counts renewals; `released`: the owner left in order."""

    owner: Owner
    beat: int
    released: bool

    def to_bytes(self) -> bytes:
        record = {**asdict(self.owner), "beat": self.beat, "released": self.released}
        return json.dumps(record).encode().ljust(RECORD_BYTES - 1) + b"\n"


class RunLock:
    """The ownership of a run directory, taken by rank 0. LOCK stays when it is released."""

    def __init__(self, paths: RunPaths, *, lease: float = LEASE, wait: bool = True) -> None:
        """Create the directory and take it; up to `lease` seconds go by until it is clear that its owner is alive.

        `wait=False` takes that one to be alive. Raises DirectoryError when another process owns the directory or it
        cannot be written, StorageError when its file system has no locks or no room.
        """
        self._paths = paths
        self._beat = 0
        self._released = threading.Event()
        self._renewing = threading.Lock()
        before = _taken(paths, lease if wait else None)
        try:
            found = _read(before)
            fence = found.owner.fence + 1 if found else _first_fence(before)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            self.owner = Owner(fence, socket.gethostname(), _boot(), os.getpid(), started, this_job(), this_attempt())
            # How the last run ended says nothing of this one. Before LOCK is in place: afterwards it may be another's.
            paths.exit_report.unlink(missing_ok=True)
            self._fd = self._put_in_place()
            self._remove_left_overs()
        except OSError as error:
            raise StorageError(f"cannot write {paths.lock}: {error.strerror}") from None
        finally:
            os.close(before)

    def keep(self, lost: Callable[[str], object], *, every: float) -> None:
        """Renew the lease in a thread from now on; call `lost` with one line once the directory is another's."""

        def renew() -> None:
            while not self._released.wait(every):
                line = None
                # A lease that cannot be renewed now may be the next time.
                with self._renewing, suppress(OSError):
                    line = None if self._released.is_set() else self._renewed()
                if line:
                    lost(line)
                    return

        threading.Thread(target=renew, name="lease", daemon=True).start()

    def release(self) -> None:
        """Leave in order: the next owner need not wait for a lease. Only the first call does something."""
        if self._released.is_set():
            return
        self._released.set()
        with self._renewing, suppress(OSError):
            self._renewed(released=True)
        os.close(self._fd)

    def _put_in_place(self) -> int:
        """A LOCK file of our own, locked before it is seen. A descriptor that keeps its lock."""
        staged = self._paths.lock.with_name(f".LOCK.{self.owner.label}.tmp")
        fd = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(fd, _Record(self.owner, 0, False).to_bytes(), 0)
            os.fsync(fd)
            os.rename(staged, self._paths.lock)
        except OSError:
            os.close(fd)
            staged.unlink(missing_ok=True)
            raise
        return fd

    def _remove_left_overs(self) -> None:
        """Files that earlier owners have not put in place: one that was asleep then cannot, and finds out."""
        for staged in itertools.chain.from_iterable(map(self._paths.root.glob, STAGED)):
            staged.unlink(missing_ok=True)

    def _renewed(self, *, released: bool = False) -> str | None:
        """Count up in LOCK if it is still ours, else say whose it is. Raises OSError."""
        try:
            # By name, to see another's file; and closed again, which makes a network file system send what was written.
            fd = os.open(self._paths.lock, os.O_RDWR)
        except FileNotFoundError:
            return _loss(self._paths, None)
        try:
            found = _read(fd)
            if found is None or found.owner != self.owner:
                return _loss(self._paths, found)
            self._beat += 1
            os.pwrite(fd, _Record(self.owner, self._beat, released).to_bytes(), 0)
        finally:
            os.close(fd)
        return None


def loss_of(paths: RunPaths, owner: Owner) -> str | None:
    """None while `owner` has the directory, else one line that says who has it. Any rank may ask. Raises OSError."""
    found = _in_place(paths)
    return None if found is not None and found.owner == owner else _loss(paths, found)


def owner_of_this_attempt(paths: RunPaths) -> Owner | None:
    """Return the owner of the directory if torchrun started it together with this process. Raises OSError."""
    found = _in_place(paths)
    if found is None or found.owner.job is None:
        return None
    return found.owner if (found.owner.job, found.owner.attempt) == (this_job(), this_attempt()) else None


def lock_holder(paths: RunPaths) -> str | None:
    """Who owns this run directory, None if nobody does; may take LEASE seconds. Changes nothing."""
    try:
        fd = os.open(paths.lock, os.O_RDWR)
    except OSError:
        return None  # there is none, or it cannot be opened: for RunLock to complain about
    try:
        return _holder(paths, fd, LEASE)
    finally:
        os.close(fd)


def _taken(paths: RunPaths, lease: float | None) -> int:
    """A descriptor of the LOCK in place, which nobody alive holds but this process. Raises as RunLock does."""
    while True:
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DirectoryError(
                f"cannot write to the run directory {paths.root}: {error.strerror}; choose another with --run.dir=DIR"
            ) from None
        try:
            if holder := _holder(paths, fd, lease):
                raise DirectoryError(
                    f"the run directory {paths.root} is in use by {holder}; wait for it or choose another --run.dir"
                )
            if os.path.samestat(os.stat(paths.lock), os.fstat(fd)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another job was here between open and flock: look at its file


def _holder(paths: RunPaths, fd: int, lease: float | None) -> str | None:
    """Who owns the directory of this open LOCK; None: nobody, and this descriptor now holds the flock if that is free.

    `lease`: seconds to watch an owner on another host, None: it counts as alive. Raises StorageError.
    """
    free = _flock(paths, fd)
    found = _read(fd)
    if found is None:
        return None if free else "another job"
    if free and (found.released or found.owner.boot == _boot()):
        return None
    if not free and (found.released or found.owner.boot == _boot()):
        gone = lease is not None and _dies(paths, fd, found, lease)
    else:
        gone = lease is not None and not _changes(paths, found, lease)
    return None if gone else str((_in_place(paths) or found).owner)


def _dies(paths: RunPaths, fd: int, found: _Record, lease: float) -> bool:
    """Whether an owner of this kernel lets go within this many seconds; `fd` then holds the flock.

    One that is killed while it writes to a slow disk, or has much memory to give back, is gone only when that is done.
    """
    deadline = time.monotonic() + lease
    while time.monotonic() < deadline and _in_place(paths) == found:
        time.sleep(lease / 100)
        if _flock(paths, fd):
            return True
    return False


def _changes(paths: RunPaths, found: _Record, lease: float) -> bool:
    """Whether LOCK says something else within this many seconds."""
    deadline = time.monotonic() + lease
    while time.monotonic() < deadline:
        time.sleep(lease / 20)
        if _in_place(paths) != found:
            return True
    return False


def _flock(paths: RunPaths, fd: int) -> bool:
    """Take the flock; False if another has it. Raises StorageError where there are no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise StorageError(f"cannot lock {paths.lock}: {error.strerror}; choose a --run.dir with locks") from None
    return True


def _in_place(paths: RunPaths) -> _Record | None:
    """What the LOCK of that name says now. Opened anew each time: a network file system then asks its server."""
    try:
        fd = os.open(paths.lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> _Record | None:
    """None if it is empty, damaged or of another kind. Raises OSError."""
    for _ in range(3):  # it may be read in the middle of a renewal
        content = os.pread(fd, 4096, 0)
        try:
            values: dict[str, Any] = json.loads(content)
            beat, released = values.pop("beat"), values.pop("released")
            return _Record(Owner(**values), beat, released)
        except (ValueError, KeyError, TypeError, AttributeError):
            time.sleep(0.01 if content else 0)
    return None


def _first_fence(fd: int) -> int:
    """1 in a new file. Where the last one cannot be read, a number above any count of owners."""
    return int(time.time()) if os.fstat(fd).st_size else 1


def _loss(paths: RunPaths, found: _Record | None) -> str:
    to = f"to {found.owner}" if found else "(its LOCK was removed or damaged)"
    return f"lost the run directory {paths.root} {to}: nothing more is written there"


def _boot() -> str:
    """What tells this kernel, as long as it runs, from all others."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
