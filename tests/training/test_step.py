"""Gradients do not depend on the micro-batch, also with dropout. Between micro-batches, ranks check whether to stop."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distgpt.config import resolve
from distgpt.distributed.gradients import Gradients
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.training import step
from distgpt.training.step import StopCheck, accumulate_gradients

SMALL = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=8", "--model.dropout=0.2"),
    *("--model.embedding_dropout", "--train.global_batch=8", "--train.dtype=float32"),
)


def loss_and_gradients(runtime: Runtime, *arguments: str, seed: int = 1, at_step: int = 1) -> list[Tensor]:
    """Return those of a rank of `runtime` for its part of the global batch."""
    config = resolve([*SMALL, *arguments], {})
    plan = make_plan(config, runtime, vocab_size=20)
    model = build_model(config, replace(plan, strategy="single"), vocab_size=20, eot_id=None)
    tokens_BT = torch.randint(20, (8, 9), generator=torch.Generator().manual_seed(0))
    mine_BT = tokens_BT.chunk(runtime.world_size)[runtime.rank]
    micro_batches = [(part_BT[:, :-1], part_BT[:, 1:]) for part_BT in torch.split(mine_BT, plan.micro_batch)]
    losses = accumulate_gradients(Gradients(model, plan), micro_batches, at_step, seed=seed)
    return [losses.sum(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def test_neither_micro_batch_nor_ranks_nor_recomputation_change_what_is_learned(one_process: Runtime) -> None:
    expected = loss_and_gradients(one_process, "--train.micro_batch=8")
    for micro_batch in (1, 2, 4):
        actual = loss_and_gradients(one_process, f"--train.micro_batch={micro_batch}")
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    ranks = [replace(one_process, rank=rank, world_size=2, local_world_size=2) for rank in (0, 1)]
    halves = zip(*(loss_and_gradients(rank, "--train.micro_batch=2") for rank in ranks), strict=True)
    torch.testing.assert_close([(a + b) / 2 for a, b in halves], expected, rtol=1e-5, atol=1e-7)
    recomputed = loss_and_gradients(one_process, "--train.micro_batch=8", "--parallel.activation_checkpoint")
    assert all(map(torch.equal, recomputed, expected))
    for other in ({"seed": 2}, {"at_step": 2}):
        assert abs(loss_and_gradients(one_process, "--train.micro_batch=8", **other)[0] - expected[0]) > 1e-3


class Clock:
    """A time.monotonic that the test moves on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "asked_after"), [(20.0, [1, 2, 3, 4]), (2.0, [1, 3, 5]), (0.01, [1, 501, 1001])])
def test_ranks_check_for_stops_every_few_seconds_counted_in_micro_batches(
    one_process: Runtime, monkeypatch: pytest.MonkeyPatch, seconds: float, asked_after: list[int]
) -> None:
    clock = Clock()
    monkeypatch.setattr(step, "time", clock)
    asked: list[int] = []
    passed = 0

    def requested() -> bool:
        asked.append(passed)
        return len(asked) == len(asked_after)

    stops = StopCheck(requested, one_process, on_wait=lambda seconds: None)
    while True:
        passed += 1
        clock.now += seconds
        if stops.agreed():
            break
    assert asked == asked_after
