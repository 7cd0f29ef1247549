"""The model of one process. tests/end_to_end trains over several ranks."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from distgpt.config import Config, resolve
from distgpt.distributed.parallelize import build_model, inference
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime


def config(*arguments: str) -> Config:
    return resolve(arguments, {})


SMALL = ("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=8", "--model.dropout=0.5")


def built(config: Config) -> torch.nn.Module:
    plan = make_plan(config, Runtime(0, 0, 1, 1, torch.device("cpu")), vocab_size=20)
    return build_model(config, plan, vocab_size=20, eot_id=None)


def test_recomputed_activations_change_nothing() -> None:
    tokens_BT = torch.arange(16).reshape(2, 8)
    losses, gradients, names = [], [], []
    for asked in ("false", "true"):
        small = config(*SMALL, f"--parallel.activation_checkpoint={asked}")
        model = built(small)
        torch.manual_seed(0)
        loss = model(tokens_BT, tokens_BT + 1).mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters()])
        names.append([name for name, _ in model.named_parameters()])
    assert losses[0] == losses[1]
    assert names[0] == names[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_are_compiled_whether_or_not_they_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    tokens_BT = torch.arange(16).reshape(2, 8)
    compiled = []
    for asked in ("false", "true"):
        torch.compiler.reset()
        graphs.clear()
        small = config(*SMALL, "--train.compile", f"--parallel.activation_checkpoint={asked}")
        model = built(small)
        model(tokens_BT, tokens_BT + 1).mean().backward()
        compiled.append(len(graphs))
    assert compiled[0] == compiled[1] > 0


def test_inference_draws_no_dropout_and_training_goes_on() -> None:
    model = built(config(*SMALL))
    tokens_BT = torch.arange(16).reshape(2, 8)
    with inference(model) as gpt:
        first, second = gpt(tokens_BT, tokens_BT + 1), gpt(tokens_BT, tokens_BT + 1)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.training
    assert not torch.equal(model(tokens_BT, tokens_BT + 1), first)
