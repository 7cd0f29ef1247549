"""A pool of worker processes: whichever process is killed, no worker is left behind and nothing waits forever.

concurrent.futures.ProcessPoolExecutor returns nothing before the end of a task, waits for running tasks when it is
closed, and its workers outlive a parent that is killed.
"""

import os
import signal
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Self

from distgpt.errors import DistgptError, StorageError, UsageError

PRELOAD = "distgpt.corpus.preparing.build"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A socket's name has at most 103 bytes on macOS, 107 on Linux.
LONGEST_SOCKET_FOLDER = 103 - len("/pymp-12345678/listener-12345678")
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


class Workers:
    """Up to `count` processes that have imported PRELOAD. They are killed when the block or their parent ends."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([PRELOAD])
        self._workers: dict[Any, BaseProcess] = {}  # by our end of their pipes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in self._workers.items():
            process.kill()
            pipe.close()
        for process in self._workers.values():
            process.join()
        self._workers.clear()

    def run(
        self, function: Callable[[Any], Iterator[Any]], tasks: Sequence[Any], *, here: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Call a module-level generator function on each task; yield the task's number and each value, as they come.

        A worker has one task at a time. `here`: this process does all, for work that takes less time than the start of
        a worker. Raises what the function raises, and StorageError if a worker is killed.
        """
        if here:
            for number, task in enumerate(tasks):
                for result in function(task):
                    yield number, result
            return
        self._start(min(self.count, len(tasks)))
        waiting, idle = deque(enumerate(tasks)), list(self._workers)
        working: dict[Any, int] = {}
        while waiting or working:
            while waiting and idle:
                pipe = idle.pop()
                working[pipe], task = waiting.popleft()
                pipe.send((function, task))
            ready: list[Any] = connection.wait(list(working))
            for pipe in ready:
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionError):
                    cause = "perhaps because memory ran out: try fewer --workers"
                    raise StorageError(f"a worker process was killed, {cause}") from None
                if kind == "error":
                    raise value
                if kind == "result":
                    yield working[pipe], value
                else:
                    del working[pipe]
                    idle.append(pipe)

    def _start(self, count: int) -> None:
        if len(self._workers) >= count:
            return
        # Ctrl-C and a batch system's SIGTERM reach the whole process group, but only the parent should react: it ends
        # the others. Signals blocked here stay blocked in the processes started. The resource tracker comes first,
        # since its start unblocks both.
        resource_tracker.ensure_running()
        before, usual_folder = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS), tempfile.tempdir
        try:
            tempfile.tempdir = socket_folder(tempfile.gettempdir())  # where multiprocessing puts its socket
            while len(self._workers) < count:
                ours, theirs = self._context.Pipe()
                process = self._context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._workers[ours] = process
        finally:
            tempfile.tempdir = usual_folder
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def socket_folder(usual: str) -> str:
    """Return the usual folder for temporary files, or one with a shorter name for the socket. Raises UsageError."""
    if len(os.fsencode(usual)) <= LONGEST_SOCKET_FOLDER:
        return usual
    for folder in SHORT_FOLDERS:
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UsageError(
        f"the folder for temporary files, {usual}, has a name too long for a socket: set TMPDIR to a path of at most "
        f"{LONGEST_SOCKET_FOLDER} bytes"
    )


def _work(pipe: Any) -> None:
    """Receive tasks and send results, in a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        function, task = pipe.recv()
        try:
            for result in function(task):
                pipe.send(("result", result))
            pipe.send(("done", None))
        except (DistgptError, OSError) as error:
            pipe.send(("error", error))
        except BaseException:
            pipe.send(("error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
