"""What ExactGradients does in one process. tests/end_to_end/test_equivalence.py compares numbers of ranks."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from distgpt.config import resolve
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.model.optim import build_optimizer
from distgpt.training.figures import not_finite
from distgpt.training.step import accumulate_gradients, apply_update

SMALL = (
    *("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=6", "--model.block_size=8", "--model.dropout=0.5"),
    *("--train.global_batch=6", "--train.micro_batch=2", "--train.dtype=float32"),
)


@pytest.fixture(autouse=True)
def numerics() -> Iterator[None]:
    """Leave to other tests what building an exact model sets."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def rank_zero(ranks: int = 1, device: str = "cpu") -> Runtime:
    return Runtime(0, 0, ranks, ranks, torch.device(device), memory=1e9)


def step(reduction: str, *, spoil: float = 1.0) -> tuple[nn.Module, Tensor, Tensor]:
    """Take a step of three micro-batches, with the losses times `spoil`. Returns model, gradients and figures."""
    config = resolve([*SMALL, f"--parallel.reduction={reduction}"], {})
    plan = make_plan(config, rank_zero(), vocab_size=20)
    model = build_model(config, plan, vocab_size=20, eot_id=None)
    optimizer = build_optimizer(model, config.optim, "cpu", exact=plan.exact)
    gradients = gradients_of(model, plan)
    tokens = torch.arange(3 * 2 * 9).view(3, 2, 9) % 20
    hook = model.register_forward_hook(lambda module, given, out: out * spoil)
    losses = accumulate_gradients(gradients, [(t[:, :-1], t[:, 1:]) for t in tokens], 1, seed=1)
    hook.remove()
    norm, figures = gradients.finish(losses, stop=True)
    summed = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    apply_update(optimizer, norm, clip=0.1, skip=not_finite(figures))
    return model, summed, figures


def test_exact_gradients_are_those_of_autograd_but_for_rounding() -> None:
    (_, usual, usual_figures), (_, exact, figures) = step("default"), step("exact")
    torch.testing.assert_close(exact, usual, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(figures, usual_figures.double(), rtol=1e-6, atol=0)
    assert figures[2] == 1
    assert exact.norm().item() == pytest.approx(figures[1].item(), rel=1e-6)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1e9, 1e20])
def test_numbers_too_large_to_be_added_are_not_finite_and_change_no_weight(spoil: float) -> None:
    model, _, figures = step("exact", spoil=spoil)
    assert figures[:2].isnan().all()
    config = resolve(SMALL, {})
    initial = build_model(config, make_plan(config, rank_zero(), vocab_size=20), vocab_size=20, eot_id=None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), initial.parameters(), strict=True))


@pytest.mark.parametrize(
    ("layout", "runtime", "fix"),
    [
        (("--parallel.strategy=diloco", "--parallel.shard=1", "--eval.every=50"), rank_zero(2), "take fsdp"),
        (("--parallel.strategy=hsdp", "--parallel.shard=1"), rank_zero(2), "--parallel.strategy=ddp"),
        ((), rank_zero(device="mps"), "--train.device=cpu"),
    ],
)
def test_layouts_that_cannot_be_exact_are_refused(layout: tuple[str, ...], runtime: Runtime, fix: str) -> None:
    config = resolve(["--train.global_batch=6", "--train.steps=100", "--parallel.reduction=exact", *layout], {})
    with pytest.raises(UsageError, match=fix):
        make_plan(config, runtime, vocab_size=20)
