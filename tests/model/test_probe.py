"""The probe names the module that computed the first NaN or infinity, not a later one that received it."""

import pytest
import torch
from torch import Tensor, nn

from distgpt.config import ModelConfig
from distgpt.model.gpt import GPT
from distgpt.model.probe import NonFiniteTensor, Probe


class Root(nn.Module):
    """The square root; its derivative at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


class Parent(nn.Module):
    """Two layers, and a multiplication by `factor` between them."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(3, 3), nn.Linear(3, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x) * self.factor)
        return out


def finding(model: nn.Module, x: Tensor, *, calls: int = 1) -> NonFiniteTensor | None:
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


def gpt_finding(model: GPT) -> NonFiniteTensor | None:
    probe, tokens_BT = Probe(), torch.arange(16).view(2, 8)
    with probe.watching(model):
        for _ in range(2):
            model(tokens_BT, tokens_BT.flip(1)).mean().backward()
    return probe.finding


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # of what other tests left unclosed
def test_a_finite_pass_has_no_finding() -> None:
    assert gpt_finding(small_gpt()) is None


@pytest.mark.parametrize(
    ("parameter", "module", "tensor"),
    [
        ("token_embedding.weight", "token_embedding", "its output"),
        ("blocks.1.mlp.down.weight", "blocks.1.mlp.down", "its output"),
        ("blocks.0.attention.qkv.weight", "blocks.0.attention.qkv", "its output"),
        ("norm.bias", "norm", "its output"),
        ("head.bias", "head", "its output"),
    ],
)
def test_an_infinite_weight_names_its_module(parameter: str, module: str, tensor: str) -> None:
    model = small_gpt()
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[0] = torch.inf
    assert gpt_finding(model) == NonFiniteTensor(module, "forward", tensor, 0)


def test_an_overflow_in_attention_names_attention_and_not_its_output_layer() -> None:
    model = small_gpt()
    with torch.no_grad():
        model.get_parameter("blocks.1.attention.qkv.weight").fill_(1e25)
    passed = "the input that it passes to blocks.1.attention.output"
    assert gpt_finding(model) == NonFiniteTensor("blocks.1.attention", "forward", passed, 0)


def test_an_overflow_between_two_layers_names_their_parent() -> None:
    overflowing = nn.Sequential(nn.Linear(3, 3), Parent(factor=torch.inf))
    assert finding(overflowing, torch.ones(2, 3)) == NonFiniteTensor(
        "1", "forward", "the input that it passes to 1.second", 0
    )
    # The factor is finite, but its product with the gradient is not.
    steep = nn.Sequential(nn.Linear(3, 3), Parent(factor=1e30))
    with torch.no_grad():
        for name in ("1.first.weight", "1.first.bias"):
            steep.get_parameter(name).fill_(1e-30)
        steep.get_parameter("1.second.weight").fill_(1e20)
    expected = NonFiniteTensor("1", "backward", "the gradient that it passes to 1.first", 0)
    assert finding(steep, torch.ones(2, 3)) == expected


def test_an_infinite_gradient_names_the_module_that_computed_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Root(), nn.Linear(3, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(-1.0)
        model.get_parameter("0.bias").fill_(0.0)
    assert finding(model, torch.ones(2, 3)) == NonFiniteTensor("2", "backward", "the gradient of its input", 0)


def test_the_gradient_of_a_weight_is_checked_too() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(0.0)
    x = torch.full((2, 3), 3e38)
    assert finding(model, x) == NonFiniteTensor("0", "backward", "the gradient of its weight", 0)


def test_the_finding_has_the_number_of_the_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(0.0)
    # The sum of the gradients of three calls exceeds the largest float32.
    x = torch.full((1, 3), 1.5e38)
    assert finding(model, x, calls=3) == NonFiniteTensor("0", "backward", "the gradient of its weight", 2)
