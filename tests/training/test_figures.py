"""The figures of a step are read without a wait for the device, and decide on its update there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distgpt.config import OptimConfig, resolve
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.model.optim import build_optimizer
from distgpt.training import figures
from distgpt.training.figures import FigureReader, Figures, not_finite
from distgpt.training.step import accumulate_gradients, apply_update, apply_update_from_host
from tests.checkpoint.checkpoints import SMALL


@pytest.fixture
def asynchronous_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read figures late on a CPU, as on a GPU."""
    monkeypatch.setattr(figures, "ASYNCHRONOUS_DEVICES", ("cpu",))


def step_figures(loss: float, *, stops: int = 0) -> Tensor:
    return torch.tensor([loss, 2.0, float(stops)])


def test_figures_are_read_at_once_on_a_cpu(one_process: Runtime) -> None:
    reader = FigureReader(one_process, at_once=False)
    reader.add(7, step_figures(2.5, stops=1), lr=0.1)
    assert reader.take(now=False) == [Figures(7, lr=0.1, loss=2.5, grad_norm=2.0, stop=True)]
    assert reader.take(now=True) == []


@pytest.mark.usefixtures("asynchronous_cpu")
def test_on_a_gpu_they_are_read_a_step_later_unless_they_are_needed(one_process: Runtime) -> None:
    reader = FigureReader(one_process, at_once=False)

    def taken(step: int, *, now: bool = False, stops: int = 0) -> list[int]:
        reader.add(step, step_figures(1.0, stops=stops), lr=0.1)
        return [figures.step for figures in reader.take(now=now)]

    assert [taken(1), taken(2), taken(3, now=True), taken(4), taken(5)] == [[], [1], [2, 3], [], [4]]
    # All ranks save and leave after step 7, the first one whose update they know nothing about.
    assert [taken(6, stops=1), taken(7)] == [[5], [6, 7]]
    at_once = FigureReader(one_process, at_once=True)
    at_once.add(1, step_figures(1.0), lr=0.1)
    assert len(at_once.take(now=False)) == 1


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_an_update_that_is_not_finite_changes_nothing(broken: float) -> None:
    weight, optimizer = trained()
    before = [weight.detach().clone(), *(t.clone() for t in optimizer.state[weight].values())]
    weight.grad = torch.full_like(weight, broken)
    apply_update(optimizer, torch.tensor(broken), clip=1.0, skip=not_finite(torch.tensor([1.0, broken, 0.0])))
    assert all(torch.equal(a, b) for a, b in zip(before, [weight, *optimizer.state[weight].values()], strict=True))
    weight.grad = torch.ones_like(weight)
    apply_update(optimizer, torch.tensor(2.0), clip=1.0, skip=not_finite(torch.tensor([1.0, 2.0, 0.0])))
    assert not torch.equal(weight, before[0])


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e3])
def test_gradients_are_clipped_as_torch_does(clip: float) -> None:
    (weight, optimizer), (expected, other) = trained(), trained()
    weight.grad, expected.grad = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(-1, 1, 12).view(3, 4)
    apply_update(optimizer, weight.grad.norm(), clip=clip)
    if clip:
        nn.utils.clip_grad_norm_([expected], clip)
    other.step()
    torch.testing.assert_close(weight, expected)


def trained() -> tuple[Tensor, torch.optim.Optimizer]:
    """Return a weight and its optimizer after one update."""
    layer = nn.Linear(4, 3, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = build_optimizer(layer, OptimConfig(lr=0.1), "cpu")
    layer.weight.grad = torch.ones(3, 4)
    optimizer.step()
    return layer.weight, optimizer


@pytest.mark.usefixtures("asynchronous_cpu")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_reads_nothing_on_the_host(one_process: Runtime, name: str) -> None:
    """Whatever reads a tensor would let a GPU wait for the host: from the data to the update."""
    options = ("--model.dropout=0.5", "--train.dtype=bfloat16", "--optim.grad_clip=1", f"--optim.name={name}")
    config = resolve([*SMALL, *options], {})
    plan = make_plan(config, one_process, vocab_size=20)
    model = build_model(config, plan, vocab_size=20, eot_id=None)
    gradients, optimizer = gradients_of(model, plan), build_optimizer(model, config.optim, "cpu")
    reader = FigureReader(one_process, at_once=False)
    batch = (torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    for step in (1, 2):
        with host_reads() as reads:
            losses = accumulate_gradients(gradients, [batch, batch], step, seed=0)
            norm, figures_of_step = gradients.finish(losses, stop=False)
            reader.add(step, figures_of_step, lr=0.1)
            apply_update(optimizer, norm, clip=1.0, skip=not_finite(figures_of_step))
            optimizer.zero_grad()
        assert reads == []
    with host_reads() as reads:
        assert [taken.step for taken in reader.take(now=True)] == [1, 2]
        norm.item()
    assert reads == ["tolist", "tolist", "aten._local_scalar_dense.default"]


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """List the operations that read tensors on the host."""
    reads: list[str] = []

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func) in ("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"):
                reads.append(str(func))
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch, Mode():  # type: ignore[no-untyped-call]
        for name in ("tolist", "numpy", "cpu"):
            original = getattr(Tensor, name)
            patch.setattr(Tensor, name, noting(reads, name, original))
        yield reads


def noting(reads: list[str], name: str, original: Any) -> Any:
    def method(tensor: Tensor, *arguments: Any) -> Any:
        reads.append(name)
        return original(tensor, *arguments)

    return method


@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_the_host_updates_as_the_device_does(clip: float) -> None:
    """Apple GPUs need it."""
    weights = []
    for update in (apply_update, apply_update_from_host):
        weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = torch.optim.AdamW([weight], lr=0.1, eps=1.0, fused=True)
        for skip in (torch.tensor(0.0), torch.tensor(1.0), None):
            weight.grad = torch.tensor([0.3, 4.0, -2.0])
            update(optimizer, weight.grad.norm(), clip=clip, skip=skip)
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)
