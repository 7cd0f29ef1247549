"""Linear layers as convolutions: the same products, where they are faster and only there."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distgpt.config import resolve
from distgpt.distributed.parallelize import recompute_blocks
from distgpt.model import cpu_linear
from distgpt.model.cpu_linear import MIN_TOKENS, Linear
from distgpt.model.gpt import GPT

INPUTS, OUTPUTS = 256, 320
# Relative and absolute. Gradients of weights are sums over all tokens.
TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.016, 1e-3)}


@pytest.fixture(autouse=True)
def on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cpu_linear, "convolution_is_faster", lambda: True)


def inputs(tokens: int = MIN_TOKENS[torch.bfloat16], sequences: int = 4) -> Tensor:
    return torch.randn(sequences, tokens // sequences, INPUTS, requires_grad=True)


def calls_onednn(layer: Linear, x: Tensor) -> bool:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        layer(x)
    return "aten::mkldnn_convolution" in {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_are_those_of_f_linear(dtype: torch.dtype, bias: bool, transposed: bool) -> None:
    layer, x = Linear(INPUTS, OUTPUTS, bias=bias), inputs()
    parts = [x, *layer.parameters()]
    given = x.transpose(0, 1) if transposed else x
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        actual, expected = layer(given), F.linear(given, layer.weight, layer.bias)
    relative, absolute = TOLERANCES[dtype]
    torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute)
    weight = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, parts, weight) for y in (actual, expected)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=relative, atol=absolute)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")  # type: ignore[no-untyped-call]
def test_torch_computes_the_convolution_in_onednn() -> None:
    """In one thread it does so for large batches of images alone, a rule that another version of torch may change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert calls_onednn(Linear(INPUTS, OUTPUTS), inputs(MIN_TOKENS[torch.float32]))
    finally:
        torch.set_num_threads(threads)


def test_elsewhere_it_is_f_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(INPUTS, OUTPUTS), inputs()
    assert not calls_onednn(layer, inputs(MIN_TOKENS[torch.float32] // 2))
    assert not calls_onednn(layer, inputs(MIN_TOKENS[torch.float32] + 4))
    assert not calls_onednn(Linear(INPUTS, 8), x)
    assert not calls_onednn(layer.double(), x.double())
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert not calls_onednn(layer, inputs(MIN_TOKENS[torch.bfloat16] // 2))
        assert not calls_onednn(Linear(INPUTS, OUTPUTS, bias=False), x)
    monkeypatch.setattr(cpu_linear, "convolution_is_faster", lambda: False)
    assert not calls_onednn(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_learns_the_same(dtype: torch.dtype, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "MIN_TOKENS", {dtype: 1})
    monkeypatch.setattr(cpu_linear, "MIN_WEIGHTS", 0)
    shape = ("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=16", "--model.mlp=gelu")
    model = GPT(resolve(["seed", *shape, "--model.dropout=0"], {}).model, 65)
    model.init_weights(0)
    if recompute:
        recompute_blocks(model)
    tokens = torch.randint(65, (4, 17))

    def learn() -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    actual = learn()
    monkeypatch.setattr(cpu_linear, "convolution_is_faster", lambda: False)
    relative, absolute = TOLERANCES[dtype]
    for a, b in zip(actual, learn(), strict=True):
        torch.testing.assert_close(a, b, rtol=relative, atol=absolute)
