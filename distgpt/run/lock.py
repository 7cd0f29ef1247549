"""The lock of a run directory: a file lock, a lease, and a fencing token that grows with each owner.

The owner holds an exclusive flock of the file LOCK, which the kernel drops when it dies, and LOCK names the owner.
Where locks do not reach from host to host, or outlive a dead host, the lease decides: the owner changes LOCK every
RENEWAL seconds. An owner on another host that has not changed it for LEASE seconds has lost it. Clocks of two hosts
are never compared.

An owner that was only suspended may wake up after another one took over. So each owner has a LOCK file of its own, put
in place by rename, and checks before every write that its file is still in place. What it writes in several steps lies
in a directory named after it, which the next owner removes before it starts.

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
    """A process that took a run directory. `boot` identifies its kernel: within one, the flock alone decides.

    `job` identifies its torchrun, `attempt` counts how often that had restarted all ranks.
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
        """A name for files that no other owner of this directory has."""
        return f"{self.fence:06d}-{self.host}-{self.pid}"


@dataclass(frozen=True)
class _Record:
    """The content of LOCK. `released`: the owner gave it back."""

    owner: Owner
    renewals: int
    released: bool

    def to_bytes(self) -> bytes:
        record = {**asdict(self.owner), "renewals": self.renewals, "released": self.released}
        return json.dumps(record).encode().ljust(RECORD_BYTES - 1) + b"\n"


class RunLock:
    """The lock of a run directory, held by rank 0. The file LOCK stays when the lock is released."""

    def __init__(self, paths: RunPaths, *, lease: float = LEASE, wait: bool = True) -> None:
        """Create the directory and lock it. May watch another owner for `lease` seconds, to see whether it is alive.

        With `wait=False` another owner counts as alive. Raises DirectoryError if another process owns the directory or
        it cannot be written, StorageError if its file system has no locks or no room.
        """
        self._paths = paths
        self._renewals = 0
        self._released = threading.Event()
        self._renewing = threading.Lock()
        before = _taken(paths, lease if wait else None)
        try:
            found = _read(before)
            fence = found.owner.fence + 1 if found else _first_fence(before)
            started = time.strftime("%Y-%m-%d %H:%M:%S %z")
            self.owner = Owner(fence, socket.gethostname(), _boot(), os.getpid(), started, this_job(), this_attempt())
            # The report of the last run. Remove it before LOCK is in place: afterwards it may be the report of another.
            paths.exit_report.unlink(missing_ok=True)
            self._fd = self._put_in_place()
            self._remove_left_overs()
        except OSError as error:
            raise StorageError(f"cannot write {paths.lock}: {error.strerror}") from None
        finally:
            os.close(before)

    def keep(self, lost: Callable[[str], object], *, every: float) -> None:
        """Renew the lease in a thread from now on; call `lost` with one line once another owner has the directory."""

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
        """Give the lock back, so that the next owner need not wait for the lease. Further calls do nothing."""
        if self._released.is_set():
            return
        self._released.set()
        with self._renewing, suppress(OSError):
            self._renewed(released=True)
        os.close(self._fd)

    def _put_in_place(self) -> int:
        """Put a LOCK file of our own in place, already locked. Returns a descriptor that keeps its lock."""
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
        """Remove files that earlier owners staged: a suspended one that wakes up cannot put them in place any more."""
        for staged in itertools.chain.from_iterable(map(self._paths.root.glob, STAGED)):
            staged.unlink(missing_ok=True)

    def _renewed(self, *, released: bool = False) -> str | None:
        """Count up in LOCK if it is still ours; otherwise return a line that names the owner. Raises OSError."""
        try:
            # Opened by name, to see the file of another owner, and closed, which makes a network file system send it.
            fd = os.open(self._paths.lock, os.O_RDWR)
        except FileNotFoundError:
            return _loss(self._paths, None)
        try:
            found = _read(fd)
            if found is None or found.owner != self.owner:
                return _loss(self._paths, found)
            self._renewals += 1
            os.pwrite(fd, _Record(self.owner, self._renewals, released).to_bytes(), 0)
        finally:
            os.close(fd)
        return None


def loss_of(paths: RunPaths, owner: Owner) -> str | None:
    """Return None while `owner` has the directory, else a line that names the owner. Raises OSError."""
    found = _in_place(paths)
    return None if found is not None and found.owner == owner else _loss(paths, found)


def owner_of_this_attempt(paths: RunPaths) -> Owner | None:
    """Return the owner of the directory if torchrun started it together with this process. Raises OSError."""
    found = _in_place(paths)
    if found is None or found.owner.job is None:
        return None
    return found.owner if (found.owner.job, found.owner.attempt) == (this_job(), this_attempt()) else None


def lock_holder(paths: RunPaths) -> str | None:
    """Return a description of the owner of a run directory, None if there is none. Takes up to LEASE seconds."""
    try:
        fd = os.open(paths.lock, os.O_RDWR)
    except OSError:
        return None  # no LOCK, or one that cannot be opened, which RunLock reports
    try:
        return _holder(paths, fd, LEASE)
    finally:
        os.close(fd)


def _taken(paths: RunPaths, lease: float | None) -> int:
    """Open the LOCK in place once no other living process holds it. Raises as RunLock does."""
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
        os.close(fd)  # another job put its file in place between open and flock: look at that one


def _holder(paths: RunPaths, fd: int, lease: float | None) -> str | None:
    """Describe the owner of this open LOCK. None: no owner is alive, and `fd` has the flock if it is free.

    `lease`: seconds to watch an owner on another host; None: it counts as alive. Raises StorageError.
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
    """Wait up to `lease` seconds for an owner of this kernel to die; `fd` then holds the flock.

    A process that is killed while it writes to a slow disk, or frees much memory, is gone only when that is done.
    """
    deadline = time.monotonic() + lease
    while time.monotonic() < deadline and _in_place(paths) == found:
        time.sleep(lease / 100)
        if _flock(paths, fd):
            return True
    return False


def _changes(paths: RunPaths, found: _Record, lease: float) -> bool:
    """Wait up to `lease` seconds for LOCK to change."""
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
    """Read the LOCK in place. It is opened anew each time: a network file system then asks its server."""
    try:
        fd = os.open(paths.lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> _Record | None:
    """Read a LOCK; None if it is empty, damaged or of another format. Raises OSError."""
    for _ in range(3):  # it may be read in the middle of a renewal
        content = os.pread(fd, 4096, 0)
        try:
            values: dict[str, Any] = json.loads(content)
            renewals, released = values.pop("renewals"), values.pop("released")
            return _Record(Owner(**values), renewals, released)
        except (ValueError, KeyError, TypeError, AttributeError):
            time.sleep(0.01 if content else 0)
    return None


def _first_fence(fd: int) -> int:
    """Return 1 for a new file. Where the last token cannot be read, a number above any count of owners."""
    return int(time.time()) if os.fstat(fd).st_size else 1


def _loss(paths: RunPaths, found: _Record | None) -> str:
    to = f"to {found.owner}" if found else "(its LOCK was removed or damaged)"
    return f"lost the run directory {paths.root} {to}: nothing more is written there"


def _boot() -> str:
    """Return what identifies this kernel, as long as it runs."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
