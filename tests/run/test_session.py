"""Every end of a run gives an exit code, exit.json and one line, and no rank outlives its torchrun."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distgpt import errors
from distgpt.run import session
from distgpt.run.exit_report import write_exit_report
from distgpt.run.lock import RunLock
from distgpt.run.outcome import outcome, say_end
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession
from tests import jobs

# A rank as in train.py, without torch. RANK and BODY are replaced.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from distgpt.errors import *
from distgpt.run import session
from distgpt.run.session import RunSession
from distgpt.run.lock import RunLock
from distgpt.run.paths import RunPaths
with RunSession(RunPaths(Path(sys.argv[1])), int(sys.argv[2])) as run:
    {body}
"""


def rank(directory: Path, body: str, *, number: int = 0, **variables: str) -> jobs.Ended:
    """Run one rank to its end."""
    program = PROGRAM.format(body=body.replace("\n", "\n    "))
    return jobs.run([sys.executable, "-c", program, str(directory), str(number)], **variables)


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (errors.UsageError("do this"), 2, "do this"),
        (errors.DataError("bad"), 65, "bad"),
        (errors.Interrupted("later"), 75, "later"),
        (
            RuntimeError("[...gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1\nmore"),
            75,
            "lost contact",
        ),
        (RuntimeError("Timed out waiting 60000ms for recv operation"), 75, "lost contact"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore"), 75, "CUDA error: uncorrectable ECC"),
        (RuntimeError("CUDA error: out of memory"), 2, "out of memory (CUDA error"),
        (RuntimeError("CUDA error: device-side assert triggered\nmore"), 70, "RuntimeError: CUDA error: device-side"),
        (MemoryError(), 2, "out of memory (MemoryError): lower train.micro_batch"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 74, "No space left on device: /x/y"),
        (OSError("odd"), 74, "odd"),
        (KeyError("x"), 70, "KeyError: 'x'"),
        (RuntimeError("shape mismatch\nat line 2"), 70, "RuntimeError: shape mismatch"),
        (ZeroDivisionError(), 70, "ZeroDivisionError"),
    ],
)
def test_outcome(error: BaseException, code: int, cause: str) -> None:
    found_code, found_cause = outcome(error)
    assert found_code == code
    assert found_cause.startswith(cause)
    assert "\n" not in found_cause


def test_gpu_out_of_memory_and_a_lost_nccl_peer_are_recognized() -> None:
    import torch
    import torch.distributed as dist

    assert outcome(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))[0] == 2
    assert outcome(dist.DistBackendError("NCCL error"))[0] == 75


def test_a_missing_compiler_is_recognized() -> None:
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    code, cause = outcome(InductorError(InvalidCxxCompiler(), None))
    assert (code, cause.startswith("torch.compile found no C++ compiler that works: ")) == (2, True)
    error = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    code, cause = outcome(InductorError(error, None))
    assert (code, cause.startswith("torch.compile found no C compiler for Triton: ")) == (2, True)


def test_done_is_reported_by_rank_0_alone(tmp_path: Path) -> None:
    assert rank(tmp_path, "run.acquire(); run.step = 7", number=0).code == 0
    expected = {"code": 0, "cause": "done", "rank": 0, "host": socket.gethostname(), "step": 7, "fence": 1, "job": None}
    assert jobs.exit_report(tmp_path) | {"time": ""} == {**expected, "time": ""}
    (tmp_path / "exit.json").unlink()
    assert rank(tmp_path, "run.attach_logs(None)", number=1).code == 0
    assert not (tmp_path / "exit.json").exists()


def test_an_error_is_one_line_and_a_report(tmp_path: Path) -> None:
    done = rank(tmp_path, "run.acquire(); run.attach_logs(run.owner); run.step = 3; raise DataError('the loss')")
    assert (done.code, done.stderr) == (65, "distgpt: error: the loss\n")
    assert jobs.exit_report(tmp_path)["cause"] == "the loss"
    assert jobs.exit_report(tmp_path)["step"] == 3
    assert "the loss" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_the_second_rank_to_fail_prints_nothing(tmp_path: Path) -> None:
    first = rank(tmp_path, "run.attach_logs(None); raise DataError('the cause')", number=1)
    assert first.stderr == "distgpt: error: the cause\n"
    second = rank(tmp_path, "run.attach_logs(None); raise RuntimeError('gloo: Connection closed by peer')", number=0)
    assert (second.code, second.stderr) == (75, "")
    assert jobs.exit_report(tmp_path) | {"time": ""} == {
        "code": 65,
        "cause": "the cause",
        "rank": 1,
        "host": socket.gethostname(),
        "step": None,
        "fence": 0,
        "time": "",
        "job": None,
    }


def test_our_bug_keeps_its_traceback_on_stderr_and_in_the_log(tmp_path: Path) -> None:
    done = rank(tmp_path, "run.acquire(); run.attach_logs(run.owner); {}['x']")
    assert done.code == 70
    assert "Traceback" in done.stderr
    assert done.error_lines == ["distgpt: error: KeyError: 'x'"]
    assert "Traceback" in (tmp_path / "logs" / "rank-0.log").read_text()


def test_a_rank_without_the_lock_writes_to_no_directory(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    copy = tmp_path / "copy.json"
    done = rank(directory, "raise UsageError('do this')", DISTGPT_EXIT_FILE=str(copy))
    assert (done.code, done.stderr) == (2, "distgpt: error: do this\n")
    assert not directory.exists()
    assert json.loads(copy.read_text())["code"] == 2


def test_other_ranks_wait_for_rank_0_to_report_the_same_error(tmp_path: Path) -> None:
    """Once the first rank ends, torchrun ends the others, which may not have printed anything yet."""
    program = PROGRAM.format(body="print('found', file=sys.stderr, flush=True); raise UsageError('do this')")
    command = [sys.executable, "-c", program, str(tmp_path / "run"), "1"]
    environment = jobs.environment(RANK="1", LOCAL_RANK="1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "found\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.terminate()
        assert process.stderr.read() == ""
        process.wait()


@pytest.mark.parametrize("job", ["x", "another"])
def test_a_rank_that_fails_alone_reports_in_the_run_directory_of_its_job(tmp_path: Path, job: str) -> None:
    """Rank 0 waits for it, and would only report a signal to stop."""
    rank_0 = f"os.environ['TORCHELASTIC_RUN_ID'] = '{job}'; RunLock(run.paths)"
    done = rank(
        tmp_path,
        f"{rank_0}; os.environ['TORCHELASTIC_RUN_ID'] = 'x'; session.RANK_ZERO_SECONDS = 0; "
        "raise RuntimeError('broken GPU')",
        number=1,
        LOCAL_RANK="1",
        TORCHELASTIC_RUN_ID="x",
    )
    assert (done.code, done.error_lines) == (70, ["distgpt: error: RuntimeError: broken GPU"])
    assert done.stderr.count("Traceback") == 1
    assert (tmp_path / "exit.json").exists() == (job == "x")
    if job == "x":
        report = jobs.exit_report(tmp_path)
        assert (report["code"], report["rank"], report["fence"]) == (70, 1, 1)


def test_the_report_of_an_earlier_attempt_does_not_silence_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 of this attempt never takes the run directory."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    paths, copy = RunPaths(tmp_path), tmp_path / "copy.json"
    lock = RunLock(paths)
    write_exit_report(paths, code=75, cause="before", rank=0, step=3, fence=lock.owner.fence)
    lock.release()
    done = rank(
        tmp_path,
        "told = run.report(75, 'now', as_first_of_host=True); print(told)",
        number=1,
        LOCAL_RANK="1",
        TORCHELASTIC_RUN_ID="x",
        TORCHELASTIC_RESTART_COUNT="1",
        DISTGPT_EXIT_FILE=str(copy),
    )
    assert done.stdout == "True\n"
    assert json.loads(copy.read_text())["cause"] == "now"
    assert jobs.exit_report(tmp_path)["cause"] == "before"


def test_a_directory_other_than_that_of_rank_0_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "NFS_ATTRIBUTE_CACHE_SECONDS", 0.0)
    shared, own = RunPaths(tmp_path / "shared"), RunPaths(tmp_path / "own")
    lock = RunLock(shared)
    assert RunSession(shared, 1).sees_same_directory(lock.owner)
    assert not RunSession(own, 1).sees_same_directory(lock.owner)
    RunLock(own).release()
    other = RunLock(own)
    assert not RunSession(own, 1).sees_same_directory(lock.owner)
    lock.release()
    other.release()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_in_training_only_sets_a_flag(tmp_path: Path, name: str) -> None:
    body = f"run.acquire(); run.allow_graceful_stop(); signal.raise_signal(signal.{name}); print(run.stop_requested)"
    done = rank(tmp_path, body)
    assert (done.code, done.stdout) == (0, f"{name}\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_while_starting_ends_the_rank(tmp_path: Path, name: str) -> None:
    done = rank(tmp_path, f"run.acquire(); signal.raise_signal(signal.{name}); time.sleep(60)")
    assert done.code == 75
    assert done.stderr == f"distgpt: interrupted by {name} before the first step: run it again to go on\n"
    assert jobs.exit_report(tmp_path)["code"] == 75


@pytest.mark.parametrize(
    ("echo_seconds", "variables", "ends"),
    [("0", {}, True), ("1e9", {}, False), ("0", {"TORCHELASTIC_RUN_ID": "x"}, False)],
    ids=["typed again", "the same once more", "under torchrun"],
)
def test_a_signal_is_acknowledged_and_only_a_second_ctrl_c_ends_the_rank_unsaved(
    tmp_path: Path, echo_seconds: str, variables: dict[str, str], ends: bool
) -> None:
    program = PROGRAM.format(
        body=f"session.ECHO_SECONDS = {echo_seconds}; run.acquire(); run.step = 3; run.allow_graceful_stop(); "
        "print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path, "0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=jobs.environment(**variables),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        again = "" if variables else "; Ctrl-C again stops it now, unsaved"  # torchrun by itself waits for its ranks
        assert process.stderr.readline() == f"distgpt: stopping after this step is saved{again}\n"
        process.send_signal(signal.SIGTERM)  # not from a terminal
        process.send_signal(signal.SIGINT)
        if ends:
            cause = "interrupted by a second Ctrl-C: steps after the newest checkpoint are not saved, "
            assert process.stderr.read().startswith(f"distgpt: {cause}")
            assert process.wait() == jobs.exit_report(tmp_path)["code"] == 75
        else:
            process.stdin.close()
            assert process.stderr.read() == ""
            assert process.wait() == jobs.exit_report(tmp_path)["code"] == 0


@jobs.linux_only
def test_a_run_ends_well_while_a_signal_is_acknowledged(tmp_path: Path) -> None:
    """Nobody reads stderr, so the thread that acknowledges it is in the write until the process has ended."""
    env = {name: value for name, value in jobs.environment().items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, bytes(4096))
    program = PROGRAM.format(
        body="run.acquire(); run.allow_graceful_stop(); signal.raise_signal(signal.SIGTERM); time.sleep(0.5)"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program, tmp_path, "0"], stderr=write, env=env, timeout=60)
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == jobs.exit_report(tmp_path)["code"] == 0


@pytest.mark.parametrize("end", [", run it again to go on", ": run it again to go on"])
def test_a_rank_under_a_launcher_gives_no_advice(
    end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When a host joins, torchrun stops all ranks and restarts them: the user need not run anything again."""
    say_end(75, f"step 4 is saved{end}")
    monkeypatch.setenv("DISTGPT_EXIT_FILE", "exit.json")
    say_end(75, f"step 4 is saved{end}")
    assert capsys.readouterr().err == f"distgpt: step 4 is saved{end}\ndistgpt: step 4 is saved\n"


AGENT = """
import os, subprocess, sys, time
import torch
worker = "import time; from distgpt.torchrun import *; die_with_agent(); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", worker], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
print(child.pid, flush=True)
child.wait()
"""


@jobs.linux_only
def test_a_wrapper_may_stand_between_a_rank_and_its_torchrun() -> None:
    wrapped = AGENT.replace(
        '[sys.executable, "-c", worker]', '["sh", "-c", \'"$0" -c "$1"; :\', sys.executable, worker]'
    )
    wrapped = wrapped.replace("time.sleep(600)", "time.sleep(0)").replace("child.wait()", "sys.exit(child.wait())")
    ended = jobs.run([sys.executable, "-c", wrapped])
    assert ended.stdout.splitlines()[1:] == ["up"], ended


@jobs.linux_only
def test_no_rank_outlives_its_torchrun() -> None:
    with subprocess.Popen([sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        worker = int(agent.stdout.readline())
        assert agent.stdout.readline() == "up\n"
        assert jobs.alive(worker)
        os.kill(agent.pid, signal.SIGKILL)
        jobs.poll(lambda: not jobs.alive(worker), seconds=30)


@jobs.linux_only
def test_variables_of_torchrun_without_torchrun_are_refused_in_one_line() -> None:
    no_ancestor = "torchrun._may_have_torchrun_ancestor = lambda pid: False"
    alone = f"from distgpt import torchrun; {no_ancestor}; torchrun.die_with_agent()"
    ended = jobs.run([sys.executable, "-c", alone], TORCHELASTIC_RUN_ID="x")
    assert ended.code == 2
    assert ended.error_lines == [
        "distgpt: error: TORCHELASTIC_RUN_ID is set, but no torchrun started this process: unset it"
    ], ended


@jobs.linux_only
def test_a_rank_whose_torchrun_is_already_gone_ends_at_once() -> None:
    worker = f"{sys.executable} -c 'from distgpt.torchrun import *; die_with_agent(); print(1); time.sleep(600)'"
    # The shell that starts the rank has ended before the rank begins.
    with subprocess.Popen(
        ["sh", "-c", f"(sleep 0.5; exec {worker}) & echo $!"],
        stdout=subprocess.PIPE,
        text=True,
        env=jobs.environment(TORCHELASTIC_RUN_ID="x"),
    ) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        jobs.poll(lambda: not jobs.alive(pid), seconds=30)
        assert shell.stdout.read() == ""
