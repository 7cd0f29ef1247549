"""A replay, in one process, of a run of several ranks."""

from collections.abc import Callable

import pytest

from tests import jobs
from tests.end_to_end.conftest import Trained


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
