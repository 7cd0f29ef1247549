"""The model of one process, or of a group of one. tests/end_to_end trains over several ranks."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from distgpt.config import Config, resolve
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import autocast, build_model, inference
from distgpt.distributed.plan import Plan, make_plan
from distgpt.distributed.runtime import Runtime


def config(*arguments: str) -> Config:
    return resolve(arguments, {})


SMALL = ("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=8", "--model.dropout=0.5")


def laid_out(config: Config, strategy: str = "single") -> Plan:
    plan = make_plan(config, Runtime(0, 0, 1, 1, torch.device("cpu")), vocab_size=20)
    return replace(plan, strategy=strategy)


def built(config: Config) -> nn.Module:
    return build_model(config, laid_out(config), vocab_size=20, eot_id=None)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def fake_group_of_two() -> Iterator[None]:
    """A group whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


MODERN = (
    *("--model.position=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu", "--model.qk_norm", "--model.n_kv_head=1"),
    *("--model.document_mask", "--model.loss_chunk=5"),
)


@pytest.mark.parametrize("seeds", [None, [5, 6]])
def test_recomputed_activations_change_nothing(seeds: list[int] | None) -> None:
    tokens_BT = torch.arange(16).reshape(2, 8)
    losses, gradients, names = [], [], []
    for asked in ("false", "true"):
        small = config(*SMALL, f"--parallel.activation_checkpoint={asked}")
        model = built(small)
        torch.manual_seed(0)
        loss = model(tokens_BT, tokens_BT + 1, dropout_seeds=seeds).mean()
        torch.manual_seed(1)
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


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(("variant", "strategy"), [("seed", "ddp"), ("modern", "fsdp"), ("gpt2", "single")])
def test_all_but_the_embedding_compiles_without_a_break(
    variant: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for all blocks, one for the norm, one for the head; again for evaluation, and for its last batch."""
    variants = {
        "seed": (),
        "modern": MODERN,
        "gpt2": ("--model.tied_head", "--model.vocab_multiple=8", "--parallel.activation_checkpoint"),
    }
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    small = config(*SMALL, *variants[variant], "--train.compile", "--train.dtype=bfloat16", "--train.micro_batch=4")
    plan = laid_out(small, strategy)
    model = build_model(small, plan, vocab_size=20, eot_id=3)
    gradients = gradients_of(model, plan)
    tokens_BT = torch.arange(32).reshape(4, 8) % 20

    def train() -> None:
        for last in (False, True):
            with gradients.micro_batch(last=last):
                with autocast(torch.device("cpu"), torch.bfloat16):
                    loss = model(tokens_BT, tokens_BT).mean()
                loss.backward()
        model.zero_grad()

    def evaluate() -> None:
        with inference(model) as gpt, autocast(torch.device("cpu"), torch.bfloat16):
            for sequences in (4, 3):
                gpt(tokens_BT[:sequences], tokens_BT[:sequences])

    train()
    assert counters["stats"]["unique_graphs"] == 3
    evaluate()
    after_evaluation = counters["stats"]["unique_graphs"]
    assert after_evaluation <= 9
    for _ in range(2):
        train()
        evaluate()
    assert counters["stats"]["unique_graphs"] == after_evaluation
    assert not counters["graph_break"]


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(("strategy", "recomputed"), [("ddp", "false"), ("fsdp", "true")])
def test_compiled_blocks_skip_documents_with_each_strategy(
    strategy: str, recomputed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlexAttention, made possible on a CPU: the losses of an uncompiled model, in graphs without a break."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None)
    monkeypatch.setattr("distgpt.model.gpt.flex_is_best", lambda device, tokens, head_size: True)
    whole = ("--train.dtype=float32", "--model.block_size=136", "--model.dropout=0", "--train.micro_batch=4")
    tokens_BT = torch.randint(20, (4, 136), generator=torch.Generator().manual_seed(0))

    def losses(*options: str) -> list[float]:
        torch.compiler.reset()
        counters.clear()
        asked = config(*SMALL, *MODERN, *whole, *options)
        model = build_model(asked, laid_out(asked, strategy), vocab_size=20, eot_id=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        found = []
        for _ in range(2):
            loss = model(tokens_BT, tokens_BT).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        with inference(model) as gpt:
            return [*found, gpt(tokens_BT, tokens_BT).mean().item()]

    expected = losses()
    assert losses("--train.compile", f"--parallel.activation_checkpoint={recomputed}") == pytest.approx(expected)
    assert counters["stats"]["unique_graphs"] == 6  # block, norm and head, to train and to evaluate
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fake_group_of_two")
@pytest.mark.parametrize("tied", ["true", "false"])
def test_what_is_gathered_and_reduced_in_a_step(tied: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of two micro-batches, two blocks, the embedding and, unless it is tied, the head."""
    calls: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def collective(*arguments: object, **others: object) -> object:
            calls[name] += 1
            return original(*arguments, **others)

        return collective

    # Their names before and since torch 2.13.
    for kind, names in {
        "gathered": ("all_gather_single", "all_gather_into_tensor"),
        "reduced": ("reduce_scatter_single", "reduce_scatter_tensor"),
    }.items():
        name = next(name for name in names if hasattr(dist, name))
        monkeypatch.setattr(dist, name, counting(kind, getattr(dist, name)))
    small = config(*SMALL, f"--model.tied_head={tied}", "--train.dtype=float32")
    tokens_BT = torch.arange(16).reshape(2, 8)
    kept_units = 1 if tied == "true" else 2  # until the backward pass, in any case
    for reshard, reduce_each, gathers in ((True, True, 2 * (2 + 2 + kept_units)), (False, False, 2 + kept_units)):
        runtime = Runtime(0, 0, 2, 2, torch.device("cpu"))
        plan = replace(
            laid_out(small, "fsdp"), runtime=runtime, ranks_per_replica=2, reshard=reshard, reduce_each=reduce_each
        )
        model = build_model(small, plan, vocab_size=20, eot_id=None)
        gradients = gradients_of(model, plan)
        for _ in range(2):  # the first step sets up the units
            calls.clear()
            for last in (False, True):
                with gradients.micro_batch(last=last):
                    model(tokens_BT, tokens_BT).mean().backward()
        assert calls == {"gathered": gathers, "reduced": (2 + kept_units) * (2 if reduce_each else 1)}
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        with inference(model) as gpt:
            gpt(tokens_BT)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_inference_draws_no_dropout_and_training_goes_on() -> None:
    model = built(config(*SMALL))
    tokens_BT = torch.arange(16).reshape(2, 8)
    with inference(model) as gpt:
        first, second = gpt(tokens_BT, tokens_BT + 1), gpt(tokens_BT, tokens_BT + 1)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.training
    assert not torch.equal(model(tokens_BT, tokens_BT + 1), first)
