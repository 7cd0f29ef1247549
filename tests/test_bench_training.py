"""bench/training.py: the loops that it compares with, and its arithmetic."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from distgpt.config import resolve
from distgpt.model.gpt import count_parameters
from tests import jobs


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, in one thread: several would wait for each other in each of many small products."""
    monkeypatch.syspath_prepend(str(jobs.PROJECT / "bench"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("training")
    torch.set_num_threads(threads)


def test_the_ancestors_model_is_that_of_the_preset_seed(training: ModuleType) -> None:
    shape = training.Shape()
    assert training.config_of(shape, "float32").model == resolve(["seed"], {}).model
    model = importlib.import_module("plain_loops").PlainGPT(shape, ancestor=True)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(resolve(["seed"], {}).model, 65)


def test_every_loop_learns(training: ModuleType) -> None:
    """A batch that is always the same is soon known by heart."""
    shape = training.Shape(n_layer=1, n_head=2, n_embd=32, block_size=8, batch=4, vocabulary=11)
    steps: list[Callable[[], float]] = [build(shape) for ranks, build in training.SIDES.values() if ranks == 1]
    assert len(steps) == 4
    for step in steps:
        first = step()
        assert [step() for _ in range(40)][-1] < 0.95 * first


def test_ratios_are_taken_within_a_round(training: ModuleType) -> None:
    seconds = {side: [1.0, 10.0, 2.0] for side in training.SIDES}
    seconds["the ancestor's loop"] = [4.0, 30.0, 8.0]
    table = training.speed_table(training.Shape(), seconds, "wall")
    assert "| the ancestor's loop | 8.00 | 2,048 | 1.00 | 0.25 |" in table
    assert "| distgpt, bfloat16, 2 ranks | 2.00 | 8,192 | 4.00 | 1.00 |" in table


def test_the_bare_loop_reads_the_data_that_training_reads(training: ModuleType, prepared: Path) -> None:
    assert training.bare_loop(prepared, 20) > 0


@pytest.mark.slow
def test_two_ranks_take_steps_together(training: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    side = "distgpt, bfloat16, 2 ranks"
    monkeypatch.setattr(training, "SIDES", {side: training.SIDES[side]})
    shape = training.Shape(n_layer=1, n_head=2, n_embd=16, block_size=8, batch=4)
    seconds = training.measure_speed(shape, 2, "cpu")
    assert [len(times) for times in seconds.values()] == [2]
    assert min(seconds[side]) > 0
