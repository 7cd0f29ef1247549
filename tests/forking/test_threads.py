"""A fork of a process that has threads."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests import jobs
from tests.forking import threads

BYTES = 2**26
FORKS = 8

pytestmark = jobs.linux_only


@pytest.fixture
def buffer() -> Iterator[ctypes.Array[ctypes.c_char]]:
    """Memory that a thread fills again and again, without the GIL. A pause is ten times as long as a write."""
    memory, ended = ctypes.create_string_buffer(BYTES), threading.Event()

    def write() -> None:
        value, pause = 0, 0.0
        while not ended.wait(pause):
            value, started = value ^ 1, time.monotonic()
            ctypes.memset(memory, value, BYTES)
            pause = 10 * (time.monotonic() - started)

    writer = threading.Thread(target=write)
    writer.start()
    yield memory
    ended.set()
    writer.join()


def test_the_work_of_a_thread_is_never_copied_half_done(buffer: ctypes.Array[ctypes.c_char]) -> None:
    assert children_with_half_a_value(threads.fork_while_others_sleep, buffer) == 0


def test_a_plain_fork_can_copy_it_half_done(buffer: ctypes.Array[ctypes.c_char]) -> None:
    """Otherwise the test above could not fail."""
    assert children_with_half_a_value(os.fork, buffer) > 0


def children_with_half_a_value(fork: Callable[[], int], buffer: ctypes.Array[ctypes.c_char]) -> int:
    """Fork often while the thread writes, and count the children in which the ends of the buffer differ."""
    differ = 0
    for _ in range(FORKS):
        while buffer[0] == buffer[BYTES - 1]:
            pass
        if not (pid := fork()):
            os._exit(buffer[0] != buffer[BYTES - 1])
        differ += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return differ
