"""The probe names the module that made the first NaN or infinity, not one that was given it."""

import pytest
import torch
from torch import Tensor, nn

from distgpt.config import ModelConfig
from distgpt.model.gpt import GPT
from distgpt.model.probe import Finding, Probe


class Root(nn.Module):
    """The square root, whose slope at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Parent(nn.Module):
    """A layer, and a computation of its own between that and the next."""

    def __init__(self, own: float) -> None:
        super().__init__()
        self.first, self.second, self.own = nn.Linear(3, 3), nn.Linear(3, 3), own

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x) * self.own)
        return out


def finding(model: nn.Module, x: Tensor, *, calls: int = 1) -> Finding | None:
    probe = Probe()
    with probe.watching(model):
        for _ in range(calls):
            model(x).sum().backward()
    leftover = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]  # noqa: SLF001 (torch has no other way to ask)
    assert leftover == []
    return probe.finding


def small_gpt() -> GPT:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=8), vocab_size=20)
    model.init_weights(0)
    return model


def gpt_finding(model: GPT) -> Finding | None:
    probe, tokens_BT = Probe(), torch.arange(16).view(2, 8)
    with probe.watching(model):
        for _ in range(2):
            model(tokens_BT, tokens_BT.flip(1)).mean().backward()
    return probe.finding


@pytest.mark.filterwarnings("error")
def test_nothing_is_found_where_all_is_finite() -> None:
    assert gpt_finding(small_gpt()) is None


@pytest.mark.parametrize(
    ("parameter", "module", "tensor"),
    [
        ("token_embedding.weight", "token_embedding", "its output"),
        ("blocks.1.mlp.down.weight", "blocks.1.mlp.down", "its output"),
        ("blocks.0.attention.qkv.weight", "blocks.0.attention.qkv", "its output"),
        ("norm.bias", "norm", "its output"),
        ("head.bias", "", "its output"),
    ],
)
def test_a_weight_that_is_not_finite_shows_in_its_module(parameter: str, module: str, tensor: str) -> None:
    model = small_gpt()
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = torch.inf
    assert gpt_finding(model) == Finding(module, "forward", tensor, 0)


def test_attention_that_overflows_is_the_attentions_and_not_of_the_layer_that_is_given_it() -> None:
    model = small_gpt()
    with torch.no_grad():
        model.get_parameter("blocks.1.attention.qkv.weight").fill_(1e25)
    given = "what it gives to blocks.1.attention.output"
    assert gpt_finding(model) == Finding("blocks.1.attention", "forward", given, 0)


def test_a_parent_answers_for_what_it_computes_between_its_layers() -> None:
    overflowing = nn.Sequential(nn.Linear(3, 3), Parent(own=torch.inf))
    assert finding(overflowing, torch.ones(2, 3)) == Finding("1", "forward", "what it gives to 1.second", 0)
    # Its own factor is finite, but not its product with a gradient.
    steep = nn.Sequential(nn.Linear(3, 3), Parent(own=1e30))
    with torch.no_grad():
        for name in ("1.first.weight", "1.first.bias"):
            steep.get_parameter(name).fill_(1e-30)
        steep.get_parameter("1.second.weight").fill_(1e20)
    found = finding(steep, torch.ones(2, 3))
    assert found == Finding("1", "backward", "the gradient that it gives to 1.first", 0)


def test_a_gradient_that_is_not_finite_shows_in_the_module_that_made_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Root(), nn.Linear(3, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(-1.0)
        model.get_parameter("0.bias").fill_(0.0)
    assert finding(model, torch.ones(2, 3)) == Finding("2", "backward", "the gradient of its input", 0)


def test_a_weights_own_gradient_counts_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(0.0)
    x = torch.full((2, 3), 3e38)
    assert finding(model, x) == Finding("0", "backward", "the gradient of its weight", 0)


def test_the_call_is_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(0.0)
    # The gradients of three calls add up to more than float32 holds.
    x = torch.full((1, 3), 1.5e38)
    assert finding(model, x, calls=3) == Finding("0", "backward", "the gradient of its weight", 2)
