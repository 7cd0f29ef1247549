"""Updates that all ranks skip, after a step that is not finite or a spike, and their records."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import jobs
from tests.end_to_end.conftest import tiny

# distgpt.train where one rank has a NaN loss in one step. After each update every rank writes a hash of its weights.
FAULTY = """
import hashlib, os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from distgpt.training import step as step_module
from distgpt.distributed.parallelize import unwrap_model

rank, correct = os.environ["RANK"], step_module.accumulate_gradients

def faulty(gradients, micro_batches, step, **others):
    broken = unwrap_model(gradients.model).blocks[1].mlp if (rank, step) == ("1", 3) else None
    hook = broken and broken.register_forward_hook(lambda module, given, out: out * float("nan"))
    losses = correct(gradients, micro_batches, step, **others)
    if hook:
        hook.remove()
    return losses

def note(optimizer, *others):
    weights = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    local = [w.to_local() if hasattr(w, "to_local") else w for w in weights]
    digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in local)).hexdigest()
    with open(f"{sys.argv[0]}.{rank}", "a") as file:
        print(digest, file=file)

step_module.accumulate_gradients = faulty
register_optimizer_step_post_hook(note)
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=False)
"""

SKIP = "--health.on_nonfinite=skip"
# distgpt.train whose figures are read a step later, as on a GPU, with a NaN loss in step 3.
LATE = """
import os, runpy
from distgpt.training import figures, step as step_module

correct = step_module.accumulate_gradients

def faulty(gradients, micro_batches, step, **others):
    losses = correct(gradients, micro_batches, step, **others)
    return losses * float("nan") if step == 3 else losses

figures.ASYNCHRONOUS_DEVICES = ("cpu",) if os.environ["LATE"] == "yes" else ()
step_module.accumulate_gradients = faulty
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=False)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_skip_an_update_that_is_not_finite_on_one_rank(prepared: Path, tmp_path: Path, strategy: str) -> None:
    run, script = tmp_path / "run", tmp_path / "faulty.py"
    script.write_text(FAULTY)
    arguments = [
        *(*tiny(prepared, run), f"--parallel.strategy={strategy}", SKIP, "--train.steps=5"),
        *("--checkpoint.every=1", "--checkpoint.keep=9", "--log.every=2", "--eval.every=0"),
    ]
    ended = jobs.run(jobs.torchrun_command(2, *arguments, script=script))
    assert ended.code == 0, ended
    expected = "loss nan and gradient norm nan at step 3: update skipped; samples 16 to 23 (their places are in logs/)"
    assert ended.stdout.splitlines().count(expected) == 1
    # Weights and moments are those of the step before, bit for bit; the next step goes on from them.
    names = [run / "checkpoints" / f"step-{step:08d}" for step in range(1, 6)]
    jobs.assert_same_tensors(names[2], names[1])
    after = jobs.tensors(names[3])
    before = jobs.tensors(names[2])
    assert [name for name in after if not torch.isfinite(after[name]).all()] == []
    assert not torch.equal(after["model.blocks.0.mlp.up.weight"], before["model.blocks.0.mlp.up.weight"])
    # Four updates on each rank; under DDP both hold the same weights after each.
    notes = [Path(f"{script}.{rank}").read_text().split() for rank in range(2)]
    assert [len(note) for note in notes] == [4, 4]
    assert (notes[0] == notes[1]) == (strategy == "ddp")
    for rank in range(2):
        assert "step 3, windows of this rank as (shard, token offset): [(" in log_of(run, rank)
    # A skipped step is logged whatever log.every is.
    lines = strict(run)
    assert [(line["step"], line["skipped"]) for line in lines if "skipped" in line] == [
        *((1, False), (2, False), (3, True), (4, False), (5, False)),
    ]
    assert [(line["loss"], line["grad_norm"]) for line in lines if line.get("skipped")] == [(None, None)]


def test_a_loss_that_is_read_late_is_never_applied(prepared: Path, tmp_path: Path) -> None:
    options = ("--train.steps=9", "--log.every=5")
    runs = {late: tmp_path / late for late in ("yes", "no")}
    for late, run in runs.items():
        ended = jobs.run(late_command(prepared, run, *options, SKIP), LATE=late)
        assert ended.code == 0, ended
        skipped = "loss nan and gradient norm [0-9.]+ at step 3: update skipped; samples 16 to 23 "
        assert len(re.findall(skipped, ended.stdout)) == 1, ended
    jobs.assert_same_tensors(*(run / "checkpoints" / "step-00000009" for run in runs.values()))
    logged = {
        late: [(line["step"], line["loss"]) for line in strict(run) if "loss" in line] for late, run in runs.items()
    }
    assert logged["yes"] == logged["no"]
    assert [step for step, _ in logged["yes"]] == [1, 3, 5, 9]
    # By default the run ends. It reads the loss of step 3 before it applies step 4, and saves nothing.
    ended = jobs.run(late_command(prepared, tmp_path / "stopped", *options), LATE="yes")
    assert ended.code == 65, ended
    assert "at step 3: stopped before the update; " in ended.error_lines[0]
    assert jobs.exit_report(tmp_path / "stopped")["step"] == 3
    assert not jobs.checkpoints(tmp_path / "stopped")


@jobs.linux_only
def test_a_run_that_reads_late_can_be_interrupted(prepared: Path, tmp_path: Path) -> None:
    options = ("--train.steps=60", "--log.every=7", SKIP)
    runs = {name: late_command(prepared, tmp_path / name, *options) for name in ("whole", "parts")}
    assert jobs.run(runs["whole"], LATE="yes").code == 0
    job = jobs.Job(runs["parts"], LATE="yes")
    job.read_until("step  7/60 ")
    job.ask_to_stop(signal.SIGTERM)
    assert job.finish().code == 75
    report, saved = jobs.exit_report(tmp_path / "parts"), jobs.checkpoints(tmp_path / "parts")
    assert saved == [f"step-{report['step']:08d}"]
    assert jobs.run(runs["parts"], LATE="yes").code == 0
    jobs.assert_same_tensors(*(tmp_path / name / "checkpoints" / "step-00000060" for name in runs))


def test_spikes_are_skipped_and_a_resumed_run_and_a_replay_skip_the_same(prepared: Path, tmp_path: Path) -> None:
    """The limit is half a standard deviation, which many steps of a slow run with small batches exceed."""
    options = (
        *("--optim.lr=3e-5", "--train.global_batch=2", "--train.micro_batch=1", "--health.skip_z=0.5"),
        "--checkpoint.keep=100",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # The first z-score is that of step 33.
    for run, last, every in ((whole, 40, 0), (parts, 30, 0), (parts, 40, 1)):
        ended = jobs.train(1, *tiny(prepared, run), *options, f"--train.steps={last}", f"--checkpoint.every={every}")
        assert ended.code == 0, ended
    trained = [line for line in strict(whole) if "loss" in line]
    spikes = [line["step"] for line in trained if max(line["loss_z"] or 0.0, line["grad_norm_z"] or 0.0) > 0.5]
    assert spikes
    assert [line["step"] for line in trained if line["skipped"]] == spikes
    for step in spikes:
        jobs.assert_same_tensors(*(parts / "checkpoints" / f"step-{s:08d}" for s in (step, step - 1)))
    measured = ("step", "loss", "grad_norm", "loss_z", "grad_norm_z", "skipped")
    resumed = [line for line in strict(parts) if "loss" in line]
    assert [[line[name] for name in measured] for line in resumed] == [
        [line[name] for name in measured] for line in trained
    ]
    jobs.assert_same_tensors(*(run / "checkpoints" / "step-00000040" for run in (whole, parts)))
    # The replay starts far enough before the step to meet spikes.
    for step in range(31, 41):
        shutil.rmtree(parts / "checkpoints" / f"step-{step:08d}")
    replayed = jobs.command("replay", parts, "--step", "40")
    assert "from      step-00000030, float32 on cpu\n" in replayed.stdout, replayed
    assert replayed_figures(replayed) == pytest.approx((trained[-1]["loss"], trained[-1]["grad_norm"]), abs=1e-5)


def late_command(prepared: Path, run: Path, *options: str) -> list[str]:
    """Return the command of a run with the program LATE, which saves only at its end."""
    script = run.parent / "late.py"
    script.write_text(LATE)
    return [sys.executable, str(script), *tiny(prepared, run), "--checkpoint.every=0", "--eval.every=0", *options]


def strict(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl with a parser that refuses NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def replayed_figures(ended: jobs.Ended) -> tuple[float, float]:
    """Return the loss and the gradient norm that a replay computed."""
    found = re.search(r"^replayed  loss (\S+) \| gradient norm (\S+)$", ended.stdout, re.MULTILINE)
    assert found, ended
    return float(found[1]), float(found[2])


def log_of(run: Path, rank: int) -> str:
    return (run / "logs" / f"rank-{rank}.log").read_text()
