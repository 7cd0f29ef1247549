"""The lock of a run directory: a file lock, a lease, and a fencing token that grows with each owner.

The owner holds an exclusive flock of the file LOCK, which the kernel drops when the owner dies. LOCK names the owner.
On some network file systems a flock does not exclude other hosts, or outlives a dead host. Between hosts the lease
decides: the owner changes LOCK every RENEWAL seconds, and an owner that has not changed it for LEASE seconds has lost
the directory. The clocks of two hosts are never compared.

An owner that was only suspended may wake up after another one took over. So each owner puts a LOCK file of its own in
place by rename, and checks before every write that it is still there. Files that take several steps to write are in a
directory named after the owner, which the next owner removes before it starts.

Imports no torch: a locked or read-only directory is noticed before anything heavy is loaded.
"""

import errno
import fcntl
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
from distgpt.run.exit_report import archive_report
from distgpt.run.paths import RunPaths
from distgpt.torchrun import this_attempt, this_job

RENEWAL, LEASE = 2.0, 10.0  # seconds
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Patterns of files that an owner stages before it renames them.
STAGED_PATTERNS = (".LOCK.*.tmp", ".staged.*.tmp", "plots/.staged.*.tmp", "tb/.staged.*.tmp", "config.toml.*.tmp")
RECORD_BYTES = 512  # always the same, so that a renewal neither grows nor shortens the file


@dataclass(frozen=True)
class Owner:
    """A process that took a run directory.

    `boot` identifies the boot of its kernel: between processes of one kernel, the flock alone decides. `job` identifies
    its torchrun. `attempt`: how often that torchrun had restarted all ranks.
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
        """A unique name among the owners of this directory, for the names of files."""
        return f"{self.fence:06d}-{self.host}-{self.pid}"


@dataclass(frozen=True)
class _Record:
    """The content of LOCK. `released`: the owner gave the lock back."""

    owner: Owner
    renewals: int
    released: bool

    def to_bytes(self) -> bytes:
        record = {**asdict(self.owner), "beat": self.renewals, "released": self.released}
        return json.dumps(record).encode().ljust(RECORD_BYTES - 1) + b"\n"


class RunLock:
    """The lock of a run directory, held by rank 0. The file LOCK stays when the lock is released."""

    def __init__(self, paths: RunPaths, *, lease: float = LEASE) -> None:
        """Create the directory and lock it. If it has an owner, watch for up to `lease` seconds whether that is alive.

        With a lease of 0, any other owner counts as alive. Raises DirectoryError if another process owns the directory
        or the directory is not writable, StorageError if its file system has no locks or no room.
        """
        self._paths = paths
        self._renewals = 0
        self._released = threading.Event()
        self._renewing = threading.Lock()
        old_fd = _open_when_free(paths, lease)
        try:
            self.owner = _new_owner(old_fd)
            # Move the report of the last run before LOCK is in place: afterwards another owner may have written it.
            archive_report(paths)
            self._fd = self._put_in_place()
            # A former owner that wakes up must not rename a file that it had staged.
            for staged in (file for pattern in STAGED_PATTERNS for file in paths.root.glob(pattern)):
                staged.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {paths.lock}: {error.strerror}") from None
        finally:
            os.close(old_fd)

    def renew_in_background(self, on_lost: Callable[[str], object], *, every: float) -> None:
        """Renew the lease in a thread, `every` so many seconds. If the lock is lost, call `on_lost` with a message."""

        def renew() -> None:
            while not self._released.wait(every):
                message = None
                # If a renewal fails with an OSError, the next one may succeed.
                with self._renewing, suppress(OSError):
                    message = None if self._released.is_set() else self._renew()
                if message:
                    on_lost(message)
                    return

        threading.Thread(target=renew, name="lease", daemon=True).start()

    def release(self) -> None:
        """Give the lock back, so that the next owner need not wait for the lease. Further calls do nothing."""
        if self._released.is_set():
            return
        self._released.set()
        with self._renewing, suppress(OSError):
            self._renew(released=True)
        os.close(self._fd)

    def _put_in_place(self) -> int:
        """Create and lock a file of our own, then rename it to LOCK. Returns its descriptor, which holds the lock."""
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

    def _renew(self, *, released: bool = False) -> str | None:
        """Renew the lease if LOCK is still ours, else return a message that names its owner. Raises OSError."""
        try:
            # Opened by name, since another owner replaces the file. Closing it makes NFS send the write.
            with open(self._paths.lock, "r+b", buffering=0) as file:
                record = _read_record(file.fileno())
                if record is None or record.owner != self.owner:
                    return _describe_lost_directory(self._paths, record)
                self._renewals += 1
                os.pwrite(file.fileno(), _Record(self.owner, self._renewals, released).to_bytes(), 0)
        except FileNotFoundError:
            return _describe_lost_directory(self._paths, None)
        return None


def _new_owner(old_fd: int) -> Owner:
    """Describe this process as the owner after the one in an open LOCK, with a higher fence. Raises OSError."""
    old = _read_record(old_fd)
    # If LOCK holds something unreadable, the time is above any fence that it can have held.
    first_fence = int(time.time()) if os.fstat(old_fd).st_size else 1
    fence = old.owner.fence + 1 if old else first_fence
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Owner(fence, socket.gethostname(), _boot_id(), os.getpid(), started, this_job(), this_attempt())


def lost_directory_message(paths: RunPaths, owner: Owner) -> str | None:
    """Return None while `owner` owns the directory, else a message that names the new owner. Raises OSError."""
    record = _read_lock(paths)
    return None if record is not None and record.owner == owner else _describe_lost_directory(paths, record)


def owner_of_this_attempt(paths: RunPaths) -> Owner | None:
    """Return the owner of the directory if it belongs to the same attempt of a torchrun job. Raises OSError."""
    record = _read_lock(paths)
    if record is None or record.owner.job is None:
        return None
    return record.owner if (record.owner.job, record.owner.attempt) == (this_job(), this_attempt()) else None


def lock_holder(paths: RunPaths) -> str | None:
    """Describe the live owner of a run directory; None if there is none. Takes up to LEASE seconds."""
    try:
        fd = os.open(paths.lock, os.O_RDWR)
    except OSError:
        return None  # no LOCK, or one that cannot be opened, which RunLock reports
    try:
        return _live_owner(paths, fd, LEASE)
    finally:
        os.close(fd)


def renewing_owner(paths: RunPaths) -> Owner | None:
    """Return the owner whose lease is alive by the time at which LOCK changed, without touching the lock; else None.

    For people to see: nothing may be decided by it, since it compares the clocks of hosts.
    """
    try:
        with open(paths.lock, "rb", buffering=0) as file:
            record, changed = _read_record(file.fileno()), os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
    alive = record is not None and not record.released and abs(time.time() - changed) < LEASE
    return record.owner if record and alive else None


def _open_when_free(paths: RunPaths, lease: float) -> int:
    """Open LOCK when no live process holds it. Returns its descriptor. Raises the errors of RunLock."""
    while True:
        try:
            paths.root.mkdir(parents=True, exist_ok=True)
            fd = os.open(paths.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise DirectoryError(
                f"cannot write to the run directory {paths.root}: {error.strerror}; choose another with --run.dir=DIR"
            ) from None
        try:
            if holder := _live_owner(paths, fd, lease):
                raise DirectoryError(
                    f"the run directory {paths.root} is in use by {holder}; wait for it or choose another --run.dir"
                )
            if os.path.samestat(os.stat(paths.lock), os.fstat(fd)):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another job has replaced the file between open and flock: try the new one


def _live_owner(paths: RunPaths, fd: int, lease: float) -> str | None:
    """Describe the live owner of an open LOCK. Without one, return None, and take the flock of `fd` if it is free.

    `lease`: the seconds to watch an owner on another host; with 0 it counts as alive. Raises StorageError.
    """
    free = _flock(paths, fd)
    record = _read_record(fd)
    if record is None:
        return None if free else "another job"
    flock_decides = record.released or record.owner.boot == _boot_id()
    if flock_decides and free:
        return None
    if lease and _is_gone(paths, fd, record, lease, flock_decides=flock_decides):
        return None
    return str((_read_lock(paths) or record).owner)


def _is_gone(paths: RunPaths, fd: int, record: _Record, lease: float, *, flock_decides: bool) -> bool:
    """Watch an owner for up to `lease` seconds and tell whether it is gone.

    If the flock decides, the owner is gone once the flock is free. A killed process may hold it for a while, until a
    write to a slow disk is done or its memory is freed. Otherwise the owner is gone if it does not renew its lease.
    """
    deadline = time.monotonic() + lease
    while time.monotonic() < deadline:
        if _read_lock(paths) != record:
            return False
        time.sleep(lease / 100)
        if flock_decides and _flock(paths, fd):
            return True
    return not flock_decides


def _flock(paths: RunPaths, fd: int) -> bool:
    """Try to take the flock; tell whether that succeeded. Raises StorageError if the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise StorageError(f"cannot lock {paths.lock}: {error.strerror}; choose a --run.dir with locks") from None
    return True


def _read_lock(paths: RunPaths) -> _Record | None:
    """Read LOCK; None if it is missing or not valid. Opens it anew, so that a network file system asks its server."""
    try:
        with open(paths.lock, "rb", buffering=0) as file:
            return _read_record(file.fileno())
    except FileNotFoundError:
        return None


def _read_record(fd: int) -> _Record | None:
    """Read an open LOCK; None if it is empty, damaged or of another format. Raises OSError."""
    for _ in range(3):  # the owner may be writing at this moment
        content = os.pread(fd, 4096, 0)
        try:
            values: dict[str, Any] = json.loads(content)
            renewals, released = values.pop("beat"), values.pop("released")
            return _Record(Owner(**values), renewals, released)
        except (ValueError, KeyError, TypeError, AttributeError):
            time.sleep(0.01 if content else 0)
    return None


def _describe_lost_directory(paths: RunPaths, record: _Record | None) -> str:
    new_owner = f"to {record.owner}" if record else "(its LOCK was removed or damaged)"
    return f"lost the run directory {paths.root} {new_owner}: nothing more is written there"


def _boot_id() -> str:
    """Return an identifier of the running kernel, which changes with each boot."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
