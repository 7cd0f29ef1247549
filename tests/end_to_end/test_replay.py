"""Replays of real runs, in other layouts than they were trained in."""

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from distgpt.corpus.shards import open_dataset
from tests import jobs
from tests.end_to_end.conftest import Trained
from tests.test_replay import infinite, saved_at_two, third_step


def test_a_replayed_step_of_several_ranks_gives_the_logged_figures(whole: Callable[[str], Trained]) -> None:
    run = whole("fsdp").run
    before = sorted(path for path in run.rglob("*"))
    ended = jobs.command("replay", run, "--step", "33")
    assert (ended.code, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[:3] == [
        "from      step-00000030, float32 on cpu",
        "weights   all finite",
        "step 33   all finite, forward and backward",
    ]
    figures = [[float(part.split()[-1]) for part in line.split(" | ")] for line in lines[3:]]
    assert [line.split()[0] for line in lines[3:]] == ["replayed", "logged"]
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)
    assert figures[1][0] == pytest.approx(jobs.losses(run)[33], abs=1e-6)
    assert sorted(path for path in run.rglob("*")) == before
    refused = jobs.command("replay", run, "--step", "37")
    assert refused.code == 2
    assert refused.stderr == "distgpt: error: --step is 37: the run has steps 1 to 36\n"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_rank_that_met_a_bad_value_is_named(prepared: Path, tmp_path: Path, strategy: str) -> None:
    """A row of the embedding is infinite, of a token that only the second rank reads."""
    dataset = open_dataset(prepared)
    with closing(third_step(dataset)) as loader:
        (first_BT, _), (second_BT, _) = loader.next_step()
    token = next(token for token in second_BT.flatten().tolist() if token not in first_BT)
    change = infinite("token_embedding.weight", token)
    saved_at_two(tmp_path, dataset, change, f"--parallel.strategy={strategy}")
    ended = jobs.run(jobs.torchrun_command(2, str(tmp_path), "--step=3", module="distgpt.replay"))
    assert ended.code == 0, ended
    lines = ended.stdout.splitlines()
    assert lines[1:4] == [
        "weights   not finite in token_embedding.weight",
        "step 3    not finite, first in the forward pass of token_embedding: its output",
        f"met by    rank 1 on {socket.gethostname()}",
    ]
    assert lines[4].startswith("samples   10 to 11, micro-batch 1 of 1, as (shard, token offset): [(0, ")
    assert lines[5] == "replayed  loss nan | gradient norm nan"
