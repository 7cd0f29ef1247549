"""Launchers pass a signal on once, and kill a torchrun that does not end by itself."""

import os
import signal
import subprocess
import sys
import time

import pytest

from distgpt.launch.agent import RankWatch, rank_states
from tests import jobs

# It tells what it is told, and ends of SIGQUIT alone, as a torchrun does whose ranks cannot save.
CHILD = """
import os, signal, sys, time
# Not print(), which a signal may interrupt, and which then refuses to be called again.
signal.signal(signal.SIGTERM, lambda *_: os.write(1, b"saving\\n"))
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"never\\n"))
signal.signal(signal.SIGQUIT, lambda *_: sys.exit(3))
print("up", flush=True)
while True:
    time.sleep(60)
"""
SUPERVISE = """
import os, sys
from distgpt.launch.agent import Supervisor
sys.exit(Supervisor(timeout=600).run([sys.executable, "-c", sys.argv[1]], os.environ))
"""


def supervised() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, CHILD],
        stdout=subprocess.PIPE,
        text=True,
        cwd=jobs.PROJECT,
        env=jobs.environment(**jobs.NOT_FORKED),
        start_new_session=True,
    )


def line_of(launcher: subprocess.Popen[str]) -> str:
    assert launcher.stdout is not None
    return launcher.stdout.readline().rstrip("\n")


@jobs.linux_only
def test_a_ctrl_c_that_is_clearly_typed_again_ends_it_at_once() -> None:
    """Two signals at once count as one: a terminal and a wrapper may both send it."""
    with supervised() as launcher:
        assert line_of(launcher) == "up"
        first = time.monotonic()
        os.killpg(launcher.pid, signal.SIGINT)
        assert line_of(launcher) == "saving"

        def ended_by_another() -> bool:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGINT)
                time.sleep(0.1)
            return launcher.poll() is not None

        jobs.poll(ended_by_another)
        assert time.monotonic() - first > 1, "it took the same one for another"
        assert (launcher.returncode, line_of(launcher)) == (3, "")


@jobs.linux_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_ctrl_backslash_ends_it(number: signal.Signals) -> None:
    with supervised() as launcher:
        assert line_of(launcher) == "up"
        launcher.send_signal(number)
        assert line_of(launcher) == "saving"
        launcher.send_signal(number)
        launcher.send_signal(signal.SIGTERM)
        launcher.send_signal(signal.SIGQUIT)
        assert launcher.wait(60) == 3
        assert line_of(launcher) == ""


@jobs.linux_only
def test_a_launcher_that_is_killed_has_its_torchrun_save() -> None:
    with supervised() as launcher:
        assert line_of(launcher) == "up"
        [child] = (pid for pid, its in jobs.environments().items() if is_child(pid, launcher.pid))
        launcher.kill()
        assert line_of(launcher) == "saving"
        os.kill(child, signal.SIGKILL)


def is_child(pid: int, parent: int) -> bool:
    try:
        return int(jobs.stat_of(pid)[1]) == parent
    except OSError:
        return False


def test_ranks_that_are_gone_for_long_exceed_the_limit() -> None:
    watch = RankWatch(3.0)
    assert [watch.limit_exceeded([]) for _ in range(9)] == [None] * 9, "it never had any"
    assert watch.limit_exceeded(["S", "Z"]) is None
    assert [watch.limit_exceeded(["Z"]) for _ in range(4)] == [None, None, None, 3]
    assert watch.limit_exceeded(["T", "R"]) is None
    assert [watch.limit_exceeded(["T", "Z"]) for _ in range(4)] == [None, None, None, 3]


def test_ranks_that_were_stopped_before_the_first_look_exceed_the_limit() -> None:
    watch = RankWatch(3.0)
    assert [watch.limit_exceeded(["T", "T"]) for _ in range(4)] == [None, None, None, 3]


def test_torchrun_has_less_time_for_ranks_that_are_gone_than_for_stopped_ones() -> None:
    for state, limit in (("Z", 60), ("T", 600)):
        watch = RankWatch(600.0)
        watch.limit_exceeded(["S"])
        assert [watch.limit_exceeded([state]) for _ in range(limit + 1)] == [None] * limit + [limit]


@jobs.linux_only
def test_the_states_of_children_are_read() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert jobs.poll(lambda: "S" in rank_states(os.getpid()))
        child.send_signal(signal.SIGSTOP)
        assert jobs.poll(lambda: "T" in rank_states(os.getpid()))
        child.kill()
    assert rank_states(child.pid) == []
