"""Muon: its matrices, its update against an exact one and torch's, clipping and skipped steps.

tests/end_to_end/test_muon.py compares sharded matrices with whole ones.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from distgpt.config import ModelConfig, OptimConfig
from distgpt.model.gpt import GPT
from distgpt.model.muon import Muon, orthogonalize
from distgpt.model.optim import build_optimizer
from distgpt.training.step import apply_update, apply_update_from_host

CONFIG = OptimConfig(name="muon", lr=0.1, weight_decay=0.5)


def small_model() -> GPT:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, mlp="swiglu"), vocab_size=11)
    model.init_weights(0)
    return model


def names_of(model: nn.Module, parameters: list[Tensor]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def polar(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return U V^T of a matrix U S V^T."""
    u, _, v = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
    result: Tensor = u @ v
    return result


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = small_model()
    optimizer = build_optimizer(model, CONFIG, "cpu")
    matrices, decayed, others = (names_of(model, group["params"]) for group in optimizer.param_groups)
    linear = ("attention.qkv", "attention.output", "mlp.up", "mlp.gate", "mlp.down")
    assert sorted(matrices) == sorted(f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in linear)
    assert decayed == ["token_embedding.weight", "position_embedding.weight", "head.weight"]
    assert {*matrices, *decayed, *others} == {name for name, _ in model.named_parameters()}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (24, 8), (8, 24)])
def test_singular_values_become_about_one_and_vectors_stay(rows: int, columns: int) -> None:
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    result = orthogonalize((u * torch.logspace(-2, 0, min(rows, columns))) @ v, torch.float32)
    in_its_basis = u.mT @ result @ v.mT
    values = in_its_basis.diagonal()
    assert values.min() > 0.65
    assert values.max() < 1.25
    torch.testing.assert_close(in_its_basis, values.diag(), atol=1e-3, rtol=0)
    assert orthogonalize(torch.zeros(rows, columns), torch.float32).count_nonzero() == 0


def test_updates_are_those_of_exact_orthogonalization(monkeypatch: pytest.MonkeyPatch) -> None:
    """Momentum 0.95 with Nesterov's look ahead, then U V^T by the SVD, with the size of AdamW's updates."""
    monkeypatch.setattr("distgpt.model.muon.orthogonalize", polar)
    model = small_model()
    weight = model.get_parameter("blocks.0.mlp.up.weight")
    optimizer = build_optimizer(model, CONFIG, "cpu")
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        assert weight.grad is not None
        momentum = 0.95 * momentum + 0.05 * weight.grad
        update = polar(0.95 * momentum + 0.05 * weight.grad)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(max(weight.shape)) * update
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)
    assert update.square().mean().sqrt() * 0.2 * math.sqrt(max(weight.shape)) == pytest.approx(0.2)


def test_updates_are_those_of_torch() -> None:
    ours, theirs = small_model(), small_model()
    matrices = [p for name, p in theirs.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    others = [p for p in theirs.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = (
        build_optimizer(ours, CONFIG, "cpu", torch.bfloat16),
        torch.optim.Muon(matrices, lr=0.1, weight_decay=0.5, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in others if p.ndim == 2], lr=0.1, weight_decay=0.5),
        torch.optim.AdamW([p for p in others if p.ndim < 2], lr=0.1, weight_decay=0.0),
    )
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=4e-3, rtol=0, msg=name)


def trained() -> tuple[GPT, Muon]:
    """Return a model and its optimizer after one update, with the gradients of another."""
    torch.manual_seed(1)
    model = small_model()
    optimizer = build_optimizer(model, CONFIG, "cpu")
    for _ in range(2):
        optimizer.step()  # the first time without gradients
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    assert isinstance(optimizer, Muon)
    return model, optimizer


def state_of(model: GPT, optimizer: Muon) -> list[Tensor]:
    moments = [optimizer.state[p][name] for p in model.parameters() for name in optimizer.state[p]]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *moments)]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_update_that_is_not_finite_changes_nothing(broken: float) -> None:
    model, optimizer = trained()
    optimizer.step()
    before = state_of(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, broken)
    apply_update(optimizer, torch.tensor(broken), clip=1.0, skip=torch.tensor(1.0))
    after = state_of(model, optimizer)
    assert len(after) == len(before) > 40
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e3])
def test_the_device_clips_as_the_host_does(clip: float) -> None:
    states = []
    for update in (apply_update, apply_update_from_host):
        model, optimizer = trained()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        update(optimizer, norm, clip=clip, skip=torch.tensor(0.0))
        states.append(state_of(model, optimizer))
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)
