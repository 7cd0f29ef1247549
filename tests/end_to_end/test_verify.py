"""Runs that are proved by taking their steps again, on another number of ranks than they were trained on."""

from collections.abc import Callable
from pathlib import Path

from tests import jobs
from tests.end_to_end.conftest import Trained, tiny

EXACT = ("--parallel.reduction=exact", "--train.steps=8", "--checkpoint.every=4", "--eval.every=0")
# distgpt.train where a bit of a weight flips in the memory of the second rank, before step 6.
FLIPPED = """
import os, runpy
import torch
from distgpt.training import step as step_module

correct = step_module.accumulate_gradients

def flipped(gradients, micro_batches, step, **others):
    if (os.environ["RANK"], step) == ("1", 6):
        weight = gradients.model.get_parameter("blocks.1.mlp.up.weight").detach()
        weight.view(torch.int32)[3, 3] ^= 1 << 12
    return correct(gradients, micro_batches, step, **others)

step_module.accumulate_gradients = flipped
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=False)
"""


def test_an_exact_run_is_proved_on_another_number_of_ranks(prepared: Path, tmp_path: Path) -> None:
    trained = jobs.torchrun(2, *tiny(prepared, tmp_path), *EXACT, "--parallel.strategy=fsdp", "--optim.name=muon")
    assert trained.code == 0, trained
    proved = jobs.command("verify", tmp_path, "--replay=4")
    assert (proved.code, proved.stderr) == (0, ""), proved
    *_, replayed, last = proved.stdout.splitlines()
    assert replayed.startswith("replayed: steps 5 to 8 on 1 rank give the same bits, weights and optimizer state, ")
    assert last == "good: 2 checkpoints, whole and as stated"


def test_a_bit_that_flipped_in_the_memory_of_a_rank_is_found(prepared: Path, tmp_path: Path) -> None:
    script = tmp_path / "flipped.py"
    script.write_text(FLIPPED)
    arguments = (*tiny(prepared, tmp_path / "run"), *EXACT, "--parallel.strategy=ddp")
    trained = jobs.run(jobs.torchrun_command(2, *arguments, script=script))
    assert trained.code == 0, trained
    proved = jobs.command("verify", tmp_path / "run", "--replay=4")
    assert proved.code == 65, proved
    (line,) = proved.error_lines
    assert "steps 5 to 8, taken again, do not lead to step-00000008: " in line


def test_a_run_whose_sums_depend_on_the_layout_is_not_replayed_in_another(whole: Callable[[str], Trained]) -> None:
    refused = jobs.command("verify", whole("fsdp").run, "--replay=6")
    assert refused.code == 2
    (line,) = refused.error_lines
    assert "the run was trained as fsdp on 2 ranks, 2 a replica, 1 threads each: a replay as single on 1 rank" in line
    assert line.endswith("take the same layout, or train with --parallel.reduction=exact")
