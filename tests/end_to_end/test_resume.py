"""Runs that were stopped, killed, or moved to other ranks end with the weights of an uninterrupted run."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import jobs
from tests.end_to_end.conftest import ARGUMENTS, RANKS, Trained, tiny


def assert_is_the_whole(run: Path, reference: Trained) -> None:
    """Check that weights and moments are equal bit for bit, and each line of metrics.jsonl is there once."""
    jobs.assert_same_tensors(run / "checkpoints" / reference.last.name, reference.last)
    assert jobs.losses(run) == jobs.losses(reference.run)
    assert jobs.val_losses(run) == jobs.val_losses(reference.run)
    assert z_scores(run) == z_scores(reference.run)


@jobs.linux_only
@pytest.mark.parametrize(("strategy", "name"), [("ddp", "SIGTERM"), ("fsdp", "SIGINT"), ("diloco", "SIGUSR1")])
def test_an_interrupted_run_goes_on_exactly(
    whole: Callable[[str], Trained], prepared: Path, tmp_path: Path, strategy: str, name: str
) -> None:
    arguments = [*tiny(prepared, tmp_path), *ARGUMENTS[strategy]]
    step = interrupt(tmp_path, RANKS[strategy], arguments, signal.Signals[name])
    ended = jobs.torchrun(RANKS[strategy], *arguments)
    assert ended.code == 0, ended
    assert f"going on from step {step} in {tmp_path}" in ended.stdout
    assert jobs.exit_report(tmp_path)["code"] == 0
    assert_is_the_whole(tmp_path, whole(strategy))


# distgpt.train whose saves copy the tensors as late as they can: when training waits for that, or has changed them.
LATE_COPIES = """
import runpy, threading
from distgpt import train
from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.staging import Stager

go = threading.Event()

def calling(first, then):
    def call(*arguments, **options):
        first()
        return then(*arguments, **options)
    return call

Stager.begin = calling(go.clear, Stager.begin)
Stager.copy = calling(lambda: go.wait(60), Stager.copy)
Checkpointer.wait = calling(go.set, Checkpointer.wait)
Checkpointer.wait_until_staged = calling(go.set, Checkpointer.wait_until_staged)
update = train.apply_update
train.apply_update = lambda *arguments, **options: (update(*arguments, **options), go.set())
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=False)
"""


def test_an_update_waits_until_a_save_has_copied_the_weights(prepared: Path, tmp_path: Path) -> None:
    script = tmp_path / "late_copies.py"
    script.write_text(LATE_COPIES)
    options = ("--train.steps=4", "--checkpoint.every=1", "--checkpoint.keep=9", "--eval.every=0")
    for run, more in (("late", ()), ("at-once", ("--checkpoint.async_save=false",))):
        ended = jobs.run([sys.executable, str(script), *tiny(prepared, tmp_path / run), *options, *more])
        assert ended.code == 0, ended
    saved = jobs.checkpoints(tmp_path / "late")
    assert len(saved) == 4
    for name in saved:
        jobs.assert_same_tensors(*(tmp_path / run / "checkpoints" / name for run in ("late", "at-once")))


# distgpt.train that writes, for each step of a rank, the numbers of its sequences and their tokens.
RECORDED = """
import json, os, runpy, sys
from distgpt.corpus.loader import Loader
from distgpt.training import step as step_module

opened, start, correct = [], Loader.__init__, step_module.accumulate_gradients

def started(loader, *arguments, **options):
    start(loader, *arguments, **options)
    opened.append(loader)

def recording(gradients, micro_batches, step, **others):
    numbers = opened[-1].sample_numbers(step - 1).tolist()
    tokens = [row for x, y in micro_batches for row in x.tolist()]
    with open(f"{sys.argv[0]}.steps", "a") as file:
        file.write(json.dumps([step, list(zip(numbers, tokens, strict=True))]) + "\\n")
    return correct(gradients, micro_batches, step, **others)

Loader.__init__, step_module.accumulate_gradients = started, recording
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=False)
"""
# Strategy, ranks and the last step of each part of a run.
STAGES = (("ddp", 4, 2), ("fsdp", 2, 4), ("single", 1, 6), ("fsdp", 3, 8), ("hsdp", 4, 10))


def test_a_run_goes_on_in_any_other_topology(prepared: Path, tmp_path: Path) -> None:
    """From 4 ranks to 2, 1, 3 and 4, with whatever micro-batch fits: the same samples, and the same losses."""

    def steps_of(name: str, *stages: tuple[str, int, int]) -> dict[int, list[list[object]]]:
        """Train a run in these stages; return the samples of each step."""
        script = tmp_path / f"{name}.py"
        script.write_text(RECORDED)
        for strategy, ranks, last in stages:
            options = ("--optim.name=muon", "--train.global_batch=12", "--train.micro_batch=0", "--eval.every=0")
            arguments = [*tiny(prepared, tmp_path / name), *ARGUMENTS[strategy], *options, f"--train.steps={last}"]
            one = [sys.executable, str(script), *arguments]
            ended = jobs.run(jobs.torchrun_command(ranks, *arguments, script=script) if ranks > 1 else one)
            assert ended.code == 0, ended
            assert f"done: step {last} in " in ended.stdout
        steps: dict[int, list[list[object]]] = {}
        for line in Path(f"{script}.steps").read_text().splitlines():
            step, samples = json.loads(line)
            steps.setdefault(step, []).extend(samples)
        return {step: sorted(samples) for step, samples in steps.items()}

    expected = steps_of("one", ("single", 1, 10))
    assert steps_of("elastic", *STAGES) == expected
    assert [number for samples in expected.values() for number, _ in samples] == list(range(10 * 12))
    assert jobs.losses(tmp_path / "elastic") == pytest.approx(jobs.losses(tmp_path / "one"), rel=1e-5)
    one, elastic = (jobs.val_losses(tmp_path / name)[10] for name in ("one", "elastic"))
    assert elastic == pytest.approx(one, rel=1e-5)


@jobs.linux_only
def test_killed_ranks_and_a_killed_agent_change_nothing(
    whole: Callable[[str], Trained], prepared: Path, tmp_path: Path
) -> None:
    arguments = [*tiny(prepared, tmp_path), "--parallel.strategy=ddp"]
    command = jobs.torchrun_command(2, *arguments)

    job = jobs.Job(command)
    job.read_until("step  7/36 ")
    jobs.poll((tmp_path / "checkpoints" / "step-00000006").is_dir)
    os.kill(job.rank(1), signal.SIGKILL)
    assert job.finish().code != 0
    report = jobs.exit_report(tmp_path)
    assert (report["code"], report["rank"]) == (75, 0)
    assert report["cause"].endswith("run it again to go on")

    job = jobs.Job(command)
    job.read_until("going on from step ")
    ranks = [job.rank(0), job.rank(1)]
    job.signal(signal.SIGKILL)
    jobs.poll(lambda: not any(map(jobs.alive, ranks)), seconds=30)
    assert job.finish().code == -signal.SIGKILL

    ended = jobs.torchrun(2, *arguments)
    assert ended.code == 0, ended
    assert_is_the_whole(tmp_path, whole("ddp"))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def started_again(whole: Callable[[str], Trained], prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a run that is done."""
    copy = tmp_path_factory.mktemp("again") / "run"
    shutil.copytree(whole("single").run, copy)
    return copy


def test_a_run_that_is_done_says_so(started_again: Path, prepared: Path) -> None:
    before = (started_again / "metrics.jsonl").read_bytes()
    ended = jobs.train(1, *tiny(prepared, started_again))
    assert (ended.code, ended.stderr) == (0, "")
    assert f"nothing to do: {started_again} is at step 36 of 36; to train further, set" in ended.stdout
    assert (started_again / "metrics.jsonl").read_bytes() == before
    assert jobs.exit_report(started_again)["code"] == 0


def test_fresh_refuses_a_directory_with_checkpoints(started_again: Path, prepared: Path) -> None:
    before = jobs.checkpoints(started_again)
    ended = jobs.train(1, *tiny(prepared, started_again), "--run.fresh")
    assert ended.code == 73
    assert ended.stderr == (
        f"distgpt: error: {started_again} holds checkpoints: --run.fresh wants an empty run directory\n"
    )
    assert jobs.exit_report(started_again)["code"] == 73
    assert jobs.checkpoints(started_again) == before

    arguments = [*tiny(prepared, started_again), "--run.fresh"]
    # By torchrun, after a rank died.
    restarted = jobs.command("train", *arguments, TORCHELASTIC_RESTART_COUNT="1", TORCHELASTIC_RUN_ID="fresh")
    assert restarted.code == 0, restarted


def z_scores(run: Path) -> list[tuple[float | None, float | None]]:
    """Return the z-scores of loss and gradient norm of each step; they are None until the window is filled."""
    found = [(line["loss_z"], line["grad_norm_z"]) for line in jobs.metrics(run) if "loss" in line]
    assert None not in found[-1]
    return found


def interrupt(run: Path, ranks: int, arguments: list[str], number: signal.Signals) -> int:
    """Send a job a signal during its run. Returns the step at which it stopped and saved."""
    job = jobs.Job(jobs.torchrun_command(ranks, *arguments))
    job.read_until("step  2/36 ")
    job.ask_to_stop(number)
    ended = job.finish()
    assert ended.code != 0
    report = jobs.exit_report(run)
    assert report["code"] == 75, ended
    step = int(report["step"])
    assert 2 <= step < 36
    assert report["cause"].startswith("interrupted by ")
    assert report["cause"].endswith(f"step {step} of 36 is saved, run it again to go on")
    assert f"distgpt: {report['cause']}" in ended.stderr.splitlines()
    assert ended.error_lines == []
    assert ended.stderr.count("distgpt: interrupted") == 1
    assert list(jobs.losses(run)) == list(range(1, step + 1))
    assert jobs.checkpoints(run)[-1] == f"step-{step:08d}"
    return step
