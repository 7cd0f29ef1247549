"""A rank that makes no progress is named, its stacks are in its log, and it is ended with the ranks of its host."""

import importlib.util
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distgpt.distributed.process_group import FLIGHT_RECORDER_EVENTS
from distgpt.health.backstop import GRACE_SECONDS, state_of
from distgpt.health.diagnosis import RankProgress, current_line, describe_hanging_ranks
from distgpt.health.watchdog import JOINING, SUSPENDED_SECONDS
from tests import jobs

# The session and the watchdog as in train.py, without torch.
PROGRAM = """
import sys, time
from pathlib import Path
from distgpt.run.session import RunSession
from distgpt.run.paths import RunPaths
from distgpt.health.watchdog import Watchdog
from distgpt.config import HealthConfig
with RunSession(RunPaths(Path(sys.argv[1])), {rank}) as run, Watchdog(run, HealthConfig(timeout=0.5)) as watchdog:
    {body}
"""
JOINED = "run.acquire()\nrun.attach_logs(None)\n"


def progress(rank: int, heartbeats: int, line: str = "a.py:1 in f") -> RankProgress:
    return RankProgress(
        rank=rank, host=f"n{rank}", pid=100 + rank, heartbeats=heartbeats, activity="in a forward pass", line=line
    )


@pytest.mark.parametrize(
    ("answers", "world_size", "stopped", "named"),
    [
        (
            [progress(0, 7), progress(1, 6), progress(2, 7)],
            3,
            [],
            "rank 1 (pid 101 on n1, in a forward pass) made less progress",
        ),
        ([progress(0, 7)], 3, [], "ranks 1, 2 did not answer"),
        ([progress(1, 7), progress(2, 2)], 3, [], "rank 0 did not answer"),
        (
            [progress(2, 7), progress(1, 7, "b.py:2 in g"), progress(0, 7)],
            3,
            [],
            "all ranks made equal progress (in a forward pass): rank 1 at b.py:2 in g; ranks 0, 2 at a.py:1 in f",
        ),
        ([progress(0, 7)], 1, [], "rank 0 (pid 100 on n0, in a forward pass)"),
        ([progress(0, 7)], 2, [1], "rank 1 of "),
    ],
)
def test_hanging_ranks_are_named(answers: list[RankProgress], world_size: int, stopped: list[int], named: str) -> None:
    assert describe_hanging_ranks(answers, world_size, stopped).startswith(named)


def run_watched(directory: Path, body: str) -> jobs.Ended:
    return jobs.run([sys.executable, "-c", program(JOINED + body), str(directory)])


def program(body: str, *, rank: int = 0) -> str:
    return PROGRAM.format(rank=rank, body=body.replace("\n", "\n    "))


def test_a_rank_that_hangs_is_ended_and_its_stacks_are_kept(tmp_path: Path) -> None:
    body = "def hanging():\n    time.sleep(600)\nwatchdog.heartbeat('in step 3', 0.5)\nhanging()"
    ended = run_watched(tmp_path, body)
    assert ended.code == 75
    report = jobs.exit_report(tmp_path)
    assert (report["code"], report["rank"]) == (75, 0)
    assert ", in step 3); the stacks of all ranks are in " in report["cause"]
    assert ended.stderr == f"distgpt: {report['cause']}\n"
    assert "in hanging\n" in (tmp_path / "logs" / "rank-0.log").read_text()


@jobs.linux_only
def test_a_rank_whose_disk_hangs_is_ended_too(tmp_path: Path) -> None:
    """Opening a pipe that nobody reads hangs, as a file on a lost server does."""
    body = "import os\nlog = run.paths.logs / 'rank-0.log'\nlog.unlink()\nos.mkfifo(log)\n"
    ended = run_watched(tmp_path, body + "watchdog.heartbeat('in step 3', 0.5)\ntime.sleep(600)")
    assert ended.code == 75
    assert ended.stderr.startswith("distgpt: rank 0 (pid ")
    assert ended.stderr.endswith(
        f", in step 3) makes no progress and cannot write to {tmp_path}: run it again to go on\n"
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("activity", "expected"), [("checking the start", ": rank"), (JOINING, ": not all of 2 ranks have joined")]
)
def test_a_rank_that_hangs_before_all_have_joined_reports_itself(
    tmp_path: Path, rank: int, activity: str, expected: str
) -> None:
    body = program(f"watchdog.heartbeat({activity!r}, 0.5)\ntime.sleep(600)", rank=rank)
    ended = jobs.run([sys.executable, "-c", body, str(tmp_path)], WORLD_SIZE="2", LOCAL_RANK=str(rank))
    assert ended.code == 75
    assert re.search(rf"{expected}.* {rank} \(pid \d+ on \S+, {activity}\); ", ended.stderr)


@jobs.linux_only
def test_a_rank_that_hangs_with_pythons_lock_held_is_ended_by_its_backstop(tmp_path: Path) -> None:
    body = "import ctypes, os\nwatchdog.heartbeat('in step 3', 2)\ntime.sleep(1)\nread, write = os.pipe()\n"
    body += "ctypes.PyDLL(None).read(read, ctypes.create_string_buffer(1), 1)"
    ended = run_watched(tmp_path, body)
    assert ended.code == -signal.SIGKILL
    assert re.fullmatch(
        r"distgpt: no progress for 1\d s: rank 0 .* hangs while it holds Python's lock; .*\n", ended.stderr
    )
    assert 'File "<string>"' in (tmp_path / "logs" / "rank-0.log").read_text()


@jobs.linux_only
def test_a_suspended_rank_goes_on(tmp_path: Path) -> None:
    """Even if it is suspended for longer than any limit."""
    body = JOINED + "watchdog.heartbeat('in step 3', 5)\nprint('up', flush=True)\nsys.stdin.readline()"
    command = [sys.executable, "-c", program(body), str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, env=jobs.environment(), stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGSTOP)
        jobs.poll(lambda: state_of(process.pid) == "T")
        time.sleep(max(SUSPENDED_SECONDS, GRACE_SECONDS) + 6)
        process.send_signal(signal.SIGCONT)
        process.communicate("go on\n")
        assert process.returncode == 0


@jobs.linux_only
def test_a_rank_whose_stderr_nobody_reads_is_ended_by_its_backstop(tmp_path: Path) -> None:
    """Even before there is a log."""
    hang = "read, write = os.pipe()\nctypes.PyDLL(None).read(read, ctypes.create_string_buffer(1), 1)"
    body = program(f"import ctypes, os\nwatchdog.heartbeat('in step 3', 1)\ntime.sleep(1)\n{hang}")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", body, str(tmp_path)]
    process = subprocess.Popen(command, stderr=write, env=jobs.environment())
    os.close(write)
    assert process.wait(timeout=60) == -signal.SIGKILL


def test_a_rank_within_its_limits_is_left_alone(tmp_path: Path) -> None:
    body = "watchdog.heartbeat('a', 3)\nfor _ in range(9):\n    time.sleep(0.5)\n    watchdog.heartbeat('b')\n"
    body += "with watchdog.during('evaluating', 60):\n    time.sleep(4)"
    assert run_watched(tmp_path, body).code == 0


def test_without_a_limit_the_watchdog_waits(tmp_path: Path) -> None:
    assert run_watched(tmp_path, "time.sleep(2)").code == 0


AGENT = """
import os, subprocess, sys
programs = sys.argv[1:]
ranks = [
    subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TORCHELASTIC_RUN_ID": "x", "RANK": str(rank)})
    for rank, program in enumerate(programs)
]
print(*(rank.pid for rank in ranks), flush=True)
print(*(rank.wait() for rank in ranks), flush=True)
"""


@jobs.linux_only
def test_a_stopped_rank_is_ended_with_the_others_of_its_host(tmp_path: Path) -> None:
    """Even if the others wait without a limit, as they do while rank 0 checks the data."""
    programs = [program(JOINED + "time.sleep(600)").replace("sys.argv[1]", repr(str(tmp_path)))]
    programs += ["import time; time.sleep(600)"] * 2
    codes, stderr = run_with_stopped_rank(1, programs)
    assert codes == [75, -signal.SIGKILL, -signal.SIGKILL]
    assert "rank 1 of " in jobs.exit_report(tmp_path)["cause"]
    assert "stopped by a signal" in jobs.exit_report(tmp_path)["cause"]
    assert stderr == f"distgpt: {jobs.exit_report(tmp_path)['cause']}\n"


@jobs.linux_only
def test_rank_0_stopped_before_all_have_joined_is_named_by_another_rank(tmp_path: Path) -> None:
    programs = ["import time; time.sleep(600)"]
    programs += [program("time.sleep(600)", rank=1).replace("sys.argv[1]", repr(str(tmp_path)))]
    # The report of an earlier attempt of the same torchrun does not count.
    copy = tmp_path / "copy.json"
    then = "2001-01-01T00:00:00+0000"
    copy.write_text(json.dumps({"code": 75, "cause": "before", "host": socket.gethostname(), "time": then}))
    codes, stderr = run_with_stopped_rank(0, programs, DISTGPT_EXIT_FILE=str(copy))
    assert codes[0] < 0  # killed by a signal: that for stacks ends a program without a handler for it
    assert codes[1] == 75
    assert stderr.count("\n") == 1
    assert ": rank 0 of " in stderr
    assert ": rank 0 of " in copy.read_text()


@jobs.linux_only
def test_a_rank_with_a_stop_signal_does_not_wait_for_a_lost_rank(tmp_path: Path) -> None:
    """torchrun, which has lost a rank, sends the others SIGTERM, and with NCCL they cannot finish their step."""
    ready = tmp_path / "ready"
    body = (
        JOINED + f"run.allow_graceful_stop()\nwatchdog.heartbeat('in step 3', 600)\n"
        f"Path({str(ready)!r}).touch()\ntime.sleep(600)"
    )
    programs = [program(body).replace("sys.argv[1]", repr(str(tmp_path / "run"))), "import time; time.sleep(600)"]
    command = [sys.executable, "-c", AGENT, *programs]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        survivor, lost = map(int, agent.stdout.readline().split())
        jobs.poll(ready.exists)
        time.sleep(2)  # the watchdog checks twice a second
        os.kill(lost, signal.SIGKILL)
        os.kill(survivor, signal.SIGTERM)
        codes, stderr = agent.communicate(timeout=120)
    assert list(map(int, codes.split())) == [75, -signal.SIGKILL]
    assert f": rank 1 of {socket.gethostname()} gone; " in stderr
    assert stderr.splitlines()[1:] == [
        f"distgpt: {jobs.exit_report(tmp_path / 'run')['cause']}"
    ]  # the first line acknowledges the signal


def test_the_current_line_is_that_of_a_save_if_the_main_thread_waits_for_it() -> None:
    written, lines, names = threading.Event(), [], dict[str, Any]()
    where = importlib.util.find_spec("distgpt.checkpoint.checkpointer")
    assert where is not None
    exec(compile("def wait(save): save.result()", str(where.origin), "exec"), names)

    def writing() -> None:
        while not written.is_set():
            time.sleep(0.01)

    def look() -> None:
        try:
            lines.append(jobs.poll(lambda: line if (line := current_line()).endswith(" in writing") else None))
        finally:
            written.set()

    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as saver:
        save = saver.submit(writing)
        threading.Thread(target=look).start()
        names["wait"](save)
    assert lines[0].startswith("test_watchdog.py:")


def run_with_stopped_rank(rank: int, programs: list[str], **variables: str) -> tuple[list[int], str]:
    """Run ranks with these programs and stop one of them. Returns the exit codes, and the stderr of all."""
    command = [sys.executable, "-c", AGENT, *programs]
    environment = {**os.environ, **variables}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as agent:
        assert agent.stdout is not None
        pids = list(map(int, agent.stdout.readline().split()))
        os.kill(pids[rank], signal.SIGSTOP)
        codes, stderr = agent.communicate(timeout=120)
    return list(map(int, codes.split())), stderr


def test_the_last_collectives_are_written_to_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of both backends, as far as this torch has them. The test fails if their private names change."""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER_EVENTS)
    program = (
        "import sys; from pathlib import Path; import torch, torch.distributed as dist\n"
        "from distgpt.health.diagnosis import write_flight_recorders\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.all_reduce(torch.ones(2)); torch._C._distributed_c10d._dump_nccl_trace = lambda: b'of NCCL'\n"
        "write_flight_recorders(Path(sys.argv[1]), 0)\n"
        "dist.destroy_process_group()"
    )
    ended = jobs.run([sys.executable, "-c", program, str(tmp_path)])
    assert ended.code == 0, ended
    recorded = (tmp_path / "flight-recorder-rank-0").read_bytes()
    assert pickle.loads(recorded)["entries"][-1]["profiling_name"].endswith("all_reduce")
    assert (tmp_path / "flight-recorder-nccl-rank-0").read_bytes() == b"of NCCL"
