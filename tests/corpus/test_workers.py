"""The pool of workers: results and errors reach the parent, and no process is left or waits forever."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distgpt.corpus.preparing import workers
from distgpt.corpus.preparing.workers import Workers
from distgpt.errors import DataError, StorageError, UsageError


def count_to(number: int) -> Iterator[tuple[int, int]]:
    for value in range(number):
        yield value, os.getpid()


def fail(kind: str) -> Iterator[int]:
    yield 1
    if kind == "data":
        raise DataError("no good")
    if kind == "disk":
        raise OSError(28, "No space left on device", "/some/file")
    if kind == "bug":
        raise ZeroDivisionError("ours")
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_order_within_a_task_from_no_more_processes_than_asked_for() -> None:
    tasks = [3, 0, 5, 1, 4, 2]
    found: list[list[int]] = [[] for _ in tasks]
    pids = set()
    with Workers(2) as pool:
        for index, (value, pid) in pool.run(count_to, tasks):
            found[index].append(value)
            pids.add(pid)
        assert list(pool.run(count_to, [])) == []
    assert found == [list(range(number)) for number in tasks]
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_exception_or_kill_in_a_task_reaches_the_parent() -> None:
    for kind, error, message in (
        ("data", DataError, "no good"),
        ("disk", OSError, "/some/file"),
        ("bug", RuntimeError, "ZeroDivisionError: ours"),
        ("kill", StorageError, "worker process was killed"),
    ):
        with Workers(1) as pool, pytest.raises(error, match=message):
            list(pool.run(fail, [kind]))


PROGRAM = """
import os, time
from distgpt.corpus.preparing.workers import Workers

def sleep(seconds):
    yield os.getpid()
    time.sleep(seconds)

if __name__ == "__main__":
    with Workers(2) as workers:
        for _, pid in workers.run(sleep, [100, 100]):
            print(pid, flush=True)
"""


def test_workers_start_with_a_long_tmpdir(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    (tmp_path / "program.py").write_text(PROGRAM.replace("[100, 100]", "[0, 0]"))
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, env=environment, check=False)
    assert (done.returncode, len(done.stdout.split()), done.stderr) == (0, 2, b"")
    assert list(folder.iterdir()) == []


def test_a_long_tmpdir_without_a_short_folder_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SHORT_FOLDERS", ("/nowhere",))
    assert workers.socket_folder("/scratch/me") == "/scratch/me"
    with pytest.raises(UsageError, match="set TMPDIR to a path of at most 71 bytes"):
        workers.socket_folder("/scratch/" + "ü" * 40)


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.02)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
