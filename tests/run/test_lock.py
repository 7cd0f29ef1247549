"""A run directory has one owner at a time: by the lock on one host, by the lease between hosts, always by the fence.

A process with another boot id stands for another host. With training jobs: tests/end_to_end/test_takeover.py.
"""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distgpt.checkpoint.store import Store
from distgpt.errors import DirectoryError
from distgpt.run.lock import BOOT_ID, LEASE, RENEWAL, RunLock, lock_holder, lost_directory_message
from distgpt.run.paths import RunPaths
from tests import jobs

# Owns a directory, renews its lease often, and commits checkpoints until it loses the directory. Arguments: directory,
# file with the boot id, and "local" for a file system whose locks do not reach from host to host.
OWNER = """
import fcntl, sys
from contextlib import suppress
from pathlib import Path
from distgpt.run import session, lock
from distgpt.run.paths import RunPaths
from distgpt.checkpoint.manifest import Origin
from distgpt.checkpoint.store import Store
from distgpt.errors import Interrupted
directory, lock.BOOT_ID, locks = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if locks == "local":
    fcntl.flock = lambda fd, how: None
with session.RunSession(RunPaths(directory), 0) as run:
    run.acquire(renewal=0.05)
    run.allow_graceful_stop()
    print("held", flush=True)
    store, step = Store(run.paths.checkpoints, run.owner), 10**6 * run.owner.fence  # other steps than owners before
    while not run.stop_requested:
        step += 1
        with suppress(OSError):
            run.require_owned()
            store.create_staging(step, 0)
            run.require_owned()
            store.commit(step, {}, Origin(None, *[""] * 6))
    raise Interrupted("told to")
"""


@dataclass
class Process:
    """An owner that can be stopped."""

    process: subprocess.Popen[str]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """Wait for its end. Returns its exit code and stderr."""
        stderr = self.process.communicate()[1]
        return self.process.returncode, stderr


@pytest.fixture
def own(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Start a process that owns tmp_path: own(elsewhere=True, locks="local")."""
    started: list[Process] = []
    other_boot = tmp_path_factory.mktemp("elsewhere") / "boot_id"
    other_boot.write_text("elsewhere\n")

    def start(*, elsewhere: bool, locks: str = "shared") -> Process:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, tmp_path, other_boot if elsewhere else BOOT_ID, locks],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=jobs.environment(),
        )
        started.append(Process(process))
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return started[-1]

    yield start
    for owner in started:
        with owner.process:
            owner.process.kill()


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def record(paths: RunPaths) -> dict[str, object]:
    found: dict[str, object] = json.loads(paths.lock.read_text())
    return found


def committed(paths: RunPaths) -> list[Path]:
    return sorted(paths.checkpoints.glob("step-*/*"))


def test_a_second_owner_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "deep" / "run")
    lock = RunLock(paths)
    paths.exit_report.write_text("{}")
    with pytest.raises(DirectoryError) as caught:
        RunLock(paths, lease=0.1)
    owner = rf"in use by pid {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(owner, str(caught.value))
    assert str(paths.root) in str(caught.value)
    assert paths.exit_report.exists()  # the owner's
    lock.release()
    RunLock(paths).release()
    assert record(paths)["fence"] == 2


def test_the_lock_is_free_after_the_owner_was_killed(own: Callable[..., Process], paths: RunPaths) -> None:
    owner = own(elsewhere=False)
    with pytest.raises(DirectoryError, match=rf"pid {owner.process.pid} on"):
        RunLock(paths)
    owner.signal(signal.SIGKILL)
    assert owner.ended()[0] == -signal.SIGKILL
    lock = RunLock(paths, lease=0)
    assert (lock.owner.fence, record(paths)["pid"]) == (2, os.getpid())
    lock.release()


def test_an_owner_that_dies_slowly_is_waited_for(paths: RunPaths) -> None:
    """A process that is killed during a write to a slow disk holds its lock until the write is done."""
    lock = RunLock(paths)
    alive = paths.lock.read_bytes()
    lock.release()
    paths.lock.write_bytes(alive)
    dying = os.open(paths.lock, os.O_RDWR)
    fcntl.flock(dying, fcntl.LOCK_EX)
    with pytest.raises(DirectoryError, match="in use by"):
        RunLock(paths, lease=0)
    threading.Timer(0.3, os.close, [dying]).start()
    lock = RunLock(paths, lease=60)
    assert lock.owner.fence == 2
    lock.release()


def test_an_owner_that_is_stopped_on_this_host_keeps_its_lock(own: Callable[..., Process], paths: RunPaths) -> None:
    owner = own(elsewhere=False)
    owner.signal(signal.SIGSTOP)
    with pytest.raises(DirectoryError, match=rf"pid {owner.process.pid} on"):
        RunLock(paths, lease=0.1)


@pytest.mark.parametrize("locks", ["shared", "local"])
def test_an_owner_on_another_host_that_renews_keeps_its_lock(
    own: Callable[..., Process], paths: RunPaths, locks: str
) -> None:
    owner = own(elsewhere=True, locks=locks)
    holder = f"pid {owner.process.pid} on {socket.gethostname()} since "
    with pytest.raises(DirectoryError, match=f"in use by {holder}"):
        RunLock(paths)
    assert (lock_holder(paths) or "").startswith(holder)
    assert record(paths)["fence"] == 1


@pytest.mark.parametrize("locks", ["shared", "local"])
def test_an_owner_that_wakes_up_after_a_takeover_writes_nothing_more(
    own: Callable[..., Process], paths: RunPaths, locks: str
) -> None:
    """With "shared" locks, the stopped owner still holds its lock, as an owner on a lost host does."""
    owner = own(elsewhere=True, locks=locks)
    owner.signal(signal.SIGSTOP)
    with pytest.raises(DirectoryError, match="in use by"):
        RunLock(paths, lease=0)
    lock = RunLock(paths, lease=0.5)
    assert lock.owner.fence == 2
    Store(paths.checkpoints, lock.owner).remove_leftovers()
    before = committed(paths), record(paths)
    owner.signal(signal.SIGCONT)
    code, stderr = owner.ended()
    assert code == 73
    line = f"lost the run directory {paths.root} to {lock.owner}: nothing more is written there"
    assert stderr == f"distgpt: error: {line}\n"
    assert (committed(paths), record(paths)) == before
    lock.release()


def test_a_dead_owner_on_another_host_is_waited_for_unless_it_released_its_lock(
    own: Callable[..., Process], paths: RunPaths
) -> None:
    owner = own(elsewhere=True)
    owner.signal(signal.SIGKILL)
    owner.ended()
    with pytest.raises(DirectoryError, match="in use by"):
        RunLock(paths, lease=0)
    RunLock(paths, lease=0.5).release()
    owner = own(elsewhere=True)
    owner.signal(signal.SIGTERM)
    assert owner.ended()[0] == 75
    lock = RunLock(paths, lease=0)
    assert lock.owner.fence == 4
    lock.release()


def test_an_owner_whose_lock_was_removed_ends(own: Callable[..., Process], paths: RunPaths) -> None:
    owner = own(elsewhere=False)
    paths.lock.unlink()
    code, stderr = owner.ended()
    assert code == 73
    assert re.fullmatch(r"distgpt: error: lost the run directory \S+ \(its LOCK was removed or damaged\): .*\n", stderr)


def test_any_rank_can_check_the_owner(paths: RunPaths) -> None:
    first = RunLock(paths)
    assert lost_directory_message(paths, first.owner) is None
    first.release()
    assert lost_directory_message(paths, first.owner) is None
    second = RunLock(paths)
    assert str(second.owner) in (lost_directory_message(paths, first.owner) or "")
    second.release()


def test_a_lock_without_a_readable_owner_is_still_a_lock(paths: RunPaths) -> None:
    lock = RunLock(paths)
    paths.lock.write_text("???")
    with pytest.raises(DirectoryError, match="in use by another job"):
        RunLock(paths)
    lock.release()
    after = RunLock(paths)
    assert after.owner.fence > 10**9  # above any earlier one
    after.release()


def test_a_new_owner_moves_the_last_exit_report_and_removes_staged_files(paths: RunPaths) -> None:
    reports = [{"code": 75, "cause": "interrupted", "step": 3}, {"code": 65, "cause": "the loss", "step": None}]
    for report in (*map(json.dumps, reports), '{"code": 6'):
        paths.exit_report.write_text(report)
        RunLock(paths).release()
        assert not paths.exit_report.exists()
    assert [json.loads(line) for line in paths.earlier_exits.read_text().splitlines()] == reports
    (paths.root / ".LOCK.000001-elsewhere-7.tmp").touch()  # of an owner that was killed before its LOCK was in place
    RunLock(paths).release()
    assert sorted(file.name for file in paths.root.iterdir()) == ["LOCK", "exits.jsonl"]


def test_a_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(DirectoryError, match=rf"cannot write to the run directory {root}: .*--run.dir=DIR"):
            RunLock(RunPaths(root))


def test_a_lease_outlasts_several_renewals() -> None:
    assert LEASE >= 4 * RENEWAL


def test_the_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    """The key of the renewals keeps its old name, so that such a file does not count as damaged."""
    held = RunLock(RunPaths(tmp_path))
    record = json.loads((tmp_path / "LOCK").read_text())
    assert record.keys() == {"fence", "host", "boot", "pid", "started", "job", "attempt", "beat", "released"}
    held.release()
