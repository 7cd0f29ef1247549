"""launch/local.sh, besides the tests in end_to_end/test_endings.py and storms/. test_quickstart.py forks nothing."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.launch.launching import launch


def test_paths_are_those_of_the_caller(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(prepared)
    (tmp_path / "my.toml").write_text('run.dir = "runs/two steps"\ntrain.steps = 2\n')
    flags = [flag for flag in jobs.TINY if not flag.startswith("--train.steps")]
    done = launch(tmp_path, "local.sh", "my.toml", *flags, "--data.path=data/mine", **jobs.environment())
    assert done.code == 0, done
    assert jobs.checkpoints(tmp_path / "runs" / "two steps")[-1] == "step-00000002"


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = launch(tmp_path, "local.sh", "--train.step=5")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == "distgpt: error: unknown key train.step: did you mean train.steps?\n"


@pytest.mark.parametrize(("name", "value"), [("NPROC_PER_NODE", "0"), ("NPROC_PER_NODE", "x"), ("TRIES", "x")])
def test_a_count_that_is_none_is_one_line(tmp_path: Path, name: str, value: str) -> None:
    done = launch(tmp_path, "local.sh", **{name: value})
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == f"distgpt: error: {name}={value}: it must be a whole number from 1\n"


def test_a_batch_that_the_ranks_cannot_share_starts_nothing(tmp_path: Path) -> None:
    done = launch(tmp_path, "local.sh", "--train.global_batch=7", NPROC_PER_NODE="2")
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("distgpt: error: train.global_batch 7 does not divide over 2 ranks: take a global")
    assert list(tmp_path.iterdir()) == []


@jobs.linux_only
def test_a_second_ctrl_c_ends_it_now_and_is_reported(prepared: Path, tmp_path: Path) -> None:
    """A second Ctrl-C during a save that never ends."""
    run, hold = tmp_path / "run", jobs.PROJECT / "tests" / "slurm" / "hold"
    run.mkdir()
    (run / "hold-step-00000006").touch()
    command = ["setsid", str(jobs.PROJECT / "launch" / "local.sh"), *jobs.TINY]
    flags = (f"--data.path={prepared}", f"--run.dir={run}")
    job = jobs.Job([*command, *flags], NPROC_PER_NODE="1", PYTHONPATH=f"{hold}:{jobs.FORKED}")
    job.read_until("step  6/36 ")
    os.killpg(job.pid, signal.SIGINT)
    time.sleep(2.5)
    assert jobs.alive(job.pid)
    os.killpg(job.pid, signal.SIGINT)
    ended, report = job.finish(), jobs.exit_report(run)
    assert ended.code == report["code"] == 75, ended
    assert "steps after the newest checkpoint are not saved" in report["cause"]
    assert ended.stderr.splitlines()[-1] == f"distgpt: {report['cause']}"


def test_data_that_is_not_there_is_one_line_before_torchrun_starts(tmp_path: Path) -> None:
    done = launch(tmp_path, "local.sh", "--data.path=nowhere")
    assert (done.code, done.stdout) == (65, "")
    assert done.stderr.startswith("distgpt: error: no prepared data in nowhere")
    assert len(done.stderr.splitlines()) == 1


def test_another_model_in_the_run_directory_is_one_line_before_torchrun_starts(prepared: Path, tmp_path: Path) -> None:
    flags = [*jobs.TINY, f"--data.path={prepared}", "--train.steps=1"]
    assert launch(tmp_path, "local.sh", *flags, **jobs.environment()).code == 0
    done = launch(tmp_path, "local.sh", *flags, "--model.n_layer=3")
    assert (done.code, done.stdout) == (2, "")
    assert "was made by another run: model.n_layer 2 -> 3; " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@jobs.linux_only
def test_ranks_that_are_done_leave_their_store_without_a_stack_trace(prepared: Path, tmp_path: Path) -> None:
    flags = [*jobs.TINY, f"--data.path={prepared}", "--train.steps=2"]
    done = launch(tmp_path, "local.sh", *flags, NPROC_PER_NODE="2", **jobs.environment())
    assert done.code == 0, done
    assert "recvValue failed" not in done.stderr, done.stderr
