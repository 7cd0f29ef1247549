"""Jobs that end early: exit codes, one line, and checkpoints that are whole."""

import json
import os
import pty
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import jobs
from tests.end_to_end.conftest import Trained, tiny

# distgpt.train, for torchrun, where rank 1 stops itself at once.
LATE = """
import os, runpy, signal
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=True)
"""


@jobs.linux_only
def test_a_signal_while_the_ranks_join(prepared: Path, tmp_path: Path) -> None:
    """Rank 0 waits in the rendezvous for rank 1, which stops itself before it gets there."""
    arguments = tiny(prepared, tmp_path / "run")
    (tmp_path / "late.py").write_text(LATE)
    job = jobs.Job(jobs.torchrun_command(2, *arguments, script=tmp_path / "late.py"))
    late = job.rank(1)
    jobs.poll(lambda: jobs.stat_of(late)[0] == "T")
    jobs.poll(lambda: has_content(tmp_path / "run" / "LOCK"))
    job.signal(signal.SIGTERM)
    jobs.poll((tmp_path / "run" / "exit.json").exists)
    os.kill(late, signal.SIGCONT)
    ended = job.finish()
    assert ended.code != 0
    report = jobs.exit_report(tmp_path / "run")
    assert (report["code"], report["step"]) == (75, None)
    cause = "interrupted by SIGTERM before the first step: run it again to go on"
    assert report["cause"] == cause
    assert [line for line in ended.stderr.splitlines() if line.startswith("distgpt:")] == [f"distgpt: {cause}"]
    # The same command trains in the same directory.
    again = jobs.train(1, *arguments, "--train.steps=1")
    assert again.code == 0, again


# distgpt.train, for torchrun, where something is wrong with rank 1 alone.
ODD = """
import os, runpy, time
import torch
from distgpt.run import session
session.NFS_ATTRIBUTE_CACHE_SECONDS = session.RANK_ZERO_SECONDS = 1.0
if os.environ["RANK"] == "1":
    {wrong}
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=True)
"""
BROKEN = """
    def broken(threads):
        # Wait until rank 0 has the run directory, also on a slow machine.
        while not (os.path.exists("run/LOCK") and os.path.getsize("run/LOCK")):
            time.sleep(0.01)
        raise RuntimeError("no such GPU")
    torch.set_num_threads = broken
"""


@pytest.mark.parametrize(
    ("wrong", "rank", "code", "cause"),
    [
        (BROKEN, 1, 70, "RuntimeError: no such GPU"),
        ("os.chdir('elsewhere')", 0, 73, f"{socket.gethostname()} does not see run: is it on a shared disk?"),
    ],
    ids=["device", "disk"],
)
def test_an_error_of_one_rank_is_reported(
    prepared: Path, tmp_path: Path, wrong: str, rank: int, code: int, cause: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "odd.py").write_text(ODD.format(wrong=wrong))
    command = jobs.torchrun_command(2, *tiny(prepared, Path("run")), script=Path("odd.py"))
    job = jobs.Job(["env", "-C", str(tmp_path), *command])
    ended = job.finish()
    report = jobs.exit_report(tmp_path / "run")
    assert (report["rank"], report["code"], report["cause"]) == (rank, code, cause)
    assert ended.error_lines == [f"distgpt: error: {cause}"], ended
    assert (ended.traceback != []) == (code == 70)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@jobs.linux_only
@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "replay"])
def test_a_signal_while_torch_is_imported(tmp_path: Path, command: str) -> None:
    arguments = {"train": [], "replay": [str(tmp_path), "--step=1"]}.get(command, [str(tmp_path)])
    job = jobs.Job([sys.executable, "-m", f"distgpt.{command}", *arguments], **jobs.NOT_FORKED)
    maps = Path(f"/proc/{job.pid}/maps")
    jobs.poll(lambda: "libtorch" in maps.read_text())
    job.signal(signal.SIGINT)
    ended = job.finish()
    assert (ended.code, ended.stdout, ended.stderr) == (75, "", "")


@jobs.linux_only
def test_a_plain_process_stops_at_a_step_as_well(prepared: Path, tmp_path: Path) -> None:
    job = jobs.Job([sys.executable, "-m", "distgpt.train", *tiny(prepared, tmp_path)])
    job.read_until("step  2/36 ")
    job.ask_to_stop(signal.SIGINT)
    ended = job.finish()
    step = jobs.exit_report(tmp_path)["step"]
    assert ended.code == 75
    assert ended.stderr.splitlines() == [
        "distgpt: stopping after this step is saved; Ctrl-C again stops it now, unsaved",
        f"distgpt: interrupted by SIGINT: step {step} of 36 is saved, run it again to go on",
    ]
    assert jobs.checkpoints(tmp_path)[-1] == f"step-{step:08d}"


# distgpt.train that prints a line for each micro-batch, and checks after each one whether to stop.
LONG_STEPS = """
import runpy
from distgpt.training import step
from distgpt.telemetry import console
step.CHECK_SECONDS = console.QUIET_SECONDS = 0
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=True)
"""


@jobs.linux_only
@pytest.mark.parametrize(("ranks", "every", "stopped_in"), [(2, 0, 2), (1, 1, 2), (1, 1, 1)])
def test_a_long_step_is_abandoned_between_two_micro_batches(
    prepared: Path, tmp_path: Path, ranks: int, every: int, stopped_in: int
) -> None:
    """The step before it is saved, unless it already was."""
    (tmp_path / "long.py").write_text(LONG_STEPS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher = torchrun if ranks > 1 else [sys.executable]
    run, count = tmp_path / "run", 200
    long = (f"--train.global_batch={2 * count * ranks}", f"--checkpoint.every={every}", "--eval.every=0")
    job = jobs.Job([*launcher, str(tmp_path / "long.py"), *tiny(prepared, run), *long])
    job.read_until(f"step  {stopped_in}/36 | micro-batch 1/{count}\n")
    # Rank 0 blocks on the pipe within a step, so the signal arrives before the end of the step.
    os.kill(job.rank(1) if ranks > 1 else job.pid, signal.SIGTERM)
    ended = job.finish()
    completed = stopped_in - 1
    assert f"step  {stopped_in}/36 | micro-batch {count}/" not in ended.stdout
    report = jobs.exit_report(run)
    assert (report["code"], report["step"] or 0) == (75, completed), ended
    assert jobs.checkpoints(run) == ([f"step-{completed:08d}"] if completed else [])
    outcome = f"step {completed} of 36 is saved, " if completed else "before the end of the first step"
    assert outcome in report["cause"]


@jobs.linux_only
def test_ctrl_c_that_reaches_torchrun_and_its_ranks_saves(prepared: Path, tmp_path: Path) -> None:
    """A terminal sends SIGINT to the launcher and to all its children, so torchrun would get it twice."""
    local = jobs.PROJECT / "launch" / "local.sh"
    # setsid: the tests must not get the signal.
    job = jobs.Job(["setsid", str(local), *tiny(prepared, tmp_path)], NPROC_PER_NODE="2")
    job.read_until("step  2/36 ")
    for _ in range(2):
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(0.1)
    job.wait_for_stopping()
    ended = job.finish()
    step = jobs.exit_report(tmp_path)["step"]
    assert ended.code == 75, ended
    assert jobs.checkpoints(tmp_path)[-1] == f"step-{step:08d}"


@jobs.linux_only
def test_a_closed_terminal_saves(prepared: Path, tmp_path: Path) -> None:
    """Nobody reads its output from then on. So nothing holds the run until it has the signal, and it has many steps."""
    local = jobs.PROJECT / "launch" / "local.sh"
    launcher, terminal = pty.fork()
    if launcher == 0:
        os.execve(
            local, [str(local), *tiny(prepared, tmp_path), "--train.steps=100000"], jobs.environment(NPROC_PER_NODE="2")
        )
    output = b""
    while b"step      2/100000 " not in output:
        output += os.read(terminal, 64)
    os.close(terminal)
    _, status = os.waitpid(launcher, 0)
    report = jobs.exit_report(tmp_path)
    assert os.waitstatus_to_exitcode(status) == report["code"] == 75
    assert report["cause"].startswith("interrupted by ")
    assert jobs.checkpoints(tmp_path)[-1] == f"step-{report['step']:08d}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with jobs.disk(tmp_path / "disk", "size=8m") as disk:
        yield disk


def test_a_disk_that_fills_up_during_a_run(
    whole: Callable[[str], Trained], prepared: Path, small_disk: Path, tmp_path: Path
) -> None:
    run, copy = small_disk / "run", tmp_path / "exit.json"
    arguments = [*tiny(prepared, run), "--parallel.strategy=fsdp", "--checkpoint.keep=100"]
    job = jobs.Job(jobs.torchrun_command(2, *arguments), DISTGPT_EXIT_FILE=str(copy))
    job.read_until("step  7/36 ")
    jobs.poll((run / "checkpoints" / "step-00000006").is_dir)
    jobs.fill(small_disk / "filler")
    ended = job.finish()
    assert ended.code != 0
    # Training went on to the end, and reported what was lost.
    assert "step 36/36 | val loss " in ended.stdout
    lost = [line for line in ended.stdout.splitlines() if line.startswith("CHECKPOINT NOT SAVED, training goes on: ")]
    assert lost
    newest = jobs.checkpoints(run)[-1]
    cause = f"step 36 could not be saved in {run / 'checkpoints'}: the newest checkpoint is {newest}"
    assert ended.error_lines == [f"distgpt: error: {cause}"]
    assert ended.traceback == []
    report = json.loads(copy.read_text())
    assert (report["code"], report["cause"]) == (74, cause)
    assert not [name for name in jobs.checkpoints(run) if not name.startswith("step-")]
    # With free space the run goes on from the last checkpoint, here in one process.
    (small_disk / "filler").unlink()
    again = jobs.train(1, *arguments)
    assert again.code == 0, again
    assert f"going on from step {int(newest.removeprefix('step-'))} in {run}" in again.stdout
    assert jobs.losses(run)[36] == pytest.approx(jobs.losses(whole("fsdp").run)[36], abs=1e-4)


def has_content(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0
