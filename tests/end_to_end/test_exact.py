"""Exact reduction: weights do not depend on the number of ranks, and ranks that compute wrongly are found.

tests/end_to_end/test_equivalence.py compares more layouts in less time, without the commands.
"""

import json
import re
import socket
from pathlib import Path

import pytest

from tests import jobs
from tests.end_to_end.conftest import tiny

EXACT = (
    *("--parallel.reduction=exact", "--train.global_batch=24", "--train.micro_batch=1", "--model.n_embd=18"),
    *("--train.steps=6", "--checkpoint.every=2", "--checkpoint.keep=9", "--eval.every=2", "--optim.grad_clip=0.3"),
)
# Each goes on from the checkpoint of the one before.
LAYOUTS = (
    (4, ("--parallel.strategy=ddp",)),
    (3, ("--parallel.strategy=fsdp",)),
    (4, ("--parallel.strategy=hsdp", "--parallel.shard=2")),
)
# distgpt.train where rank 1 flips a bit in each matrix product of the first MLP, from its call number FIRST on.
FAULTY = """
import itertools, os, runpy, torch
from distgpt.model import gpt

correct, calls, every = gpt.MLP.forward, itertools.count(), int(os.environ["EVERY"])

def faulty(mlp, *arguments):
    out = correct(mlp, *arguments)
    if mlp.training and (call := next(calls)) >= int(os.environ["FIRST"]) and call % every == 0:
        out.data.view(torch.int32).view(-1)[call % out.numel()] ^= 1 << int(os.environ["BIT"])
    return out

if os.environ["RANK"] == "1":
    gpt.MLP.forward = faulty
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=False)
"""


def test_weights_are_the_same_on_changing_numbers_of_ranks(prepared: Path, tmp_path: Path) -> None:
    """Ranks that check each other change nothing."""
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    assert jobs.train(1, *tiny(prepared, alone), *EXACT).code == 0
    for steps, (ranks, layout) in zip((2, 4, 6), LAYOUTS, strict=True):
        ended = jobs.train(
            ranks, *tiny(prepared, parts), *EXACT, f"--train.steps={steps}", *layout, "--health.check_every=1"
        )
        assert ended.code == 0, ended
        assert "gradients are summed exactly" in re.sub(r"\s+", " ", ended.stdout)
    for step in (2, 4, 6):
        jobs.assert_same_tensors(*(run / "checkpoints" / f"step-{step:08d}" for run in (alone, parts)))
    assert figures(alone) == figures(parts)


@pytest.mark.parametrize(
    ("layout", "every"), [((3, "--parallel.strategy=ddp"), 1), ((2, "--parallel.strategy=fsdp"), 7)]
)
def test_a_rank_that_computes_wrongly_is_named_before_it_saves(
    prepared: Path, tmp_path: Path, layout: tuple[int, str], every: int
) -> None:
    """A persistent fault, which the majority of three ranks tells, and one that comes and goes."""
    ranks, strategy = layout
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    arguments = [*tiny(prepared, tmp_path / "run"), *EXACT, strategy, "--health.check_every=2", "--checkpoint.every=3"]
    calls = 24 // ranks * 2  # of an MLP in a step
    ended = jobs.run(
        jobs.torchrun_command(ranks, *arguments, script=script),
        FIRST=str(3 * calls + 4),
        EVERY=str(every),
        BIT="21",
    )
    exit_report = json.loads((tmp_path / "run" / "exit.json").read_text())
    host = socket.gethostname()
    assert exit_report["code"] == 65, ended
    assert f"rank 1 on {host} computes other gradients in step 4 than" in exit_report["cause"]
    assert "checkpoints after step 2 may be wrong" in exit_report["cause"]
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    # Saved before the fault was found: the best evaluation and, if it was committed by then, step 3.
    assert {"step-00000002"} <= saved <= {"step-00000002", "step-00000003"}


def figures(run: Path) -> list[dict[str, float]]:
    """Return what a run logged of its training and evaluation."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    names = ("step", "loss", "grad_norm", "val_loss", "val_bits_per_byte")
    return [{name: line[name] for name in names if name in line} for line in lines]
