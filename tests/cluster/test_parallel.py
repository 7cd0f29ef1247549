"""How a batch and a model are spread. What it computes, over real ranks, is in tests/end_to_end."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from distgpt.cluster import parallel
from distgpt.cluster.parallel import build_model, choose_strategy, inference, micro_batch_size
from distgpt.cluster.runtime import Runtime
from distgpt.config import Config, resolve
from distgpt.errors import UsageError
from distgpt.model.gpt import count_parameters


def runtime(ranks: int, per_node: int | None = None) -> Runtime:
    return Runtime(0, 0, ranks, per_node or ranks, torch.device("cpu"))


def config(*arguments: str) -> Config:
    return resolve(arguments, {})


def refusal(ranks: int, *arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        micro_batch_size(config(*arguments), runtime(ranks))
    return str(caught.value)


def test_micro_batch_is_the_one_asked_for() -> None:
    asked = config("--train.global_batch=24", "--train.micro_batch=3")
    assert [micro_batch_size(asked, runtime(ranks)) for ranks in (1, 2, 4, 8)] == [3, 3, 3, 3]


def test_micro_batch_is_by_itself_the_largest_that_divides_and_fits() -> None:
    limit = parallel.AUTO_MICRO_BATCH_TOKENS["cpu"] // 256
    for ranks, expected in {1: 16, 2: 12, 3: 16, 8: 6, 48: 1}.items():
        found = micro_batch_size(config("--train.global_batch=48", "--model.block_size=256"), runtime(ranks))
        assert found == expected <= limit
    assert micro_batch_size(config("--model.block_size=100000"), runtime(1)) == 1  # one sequence must fit


def test_a_global_batch_that_does_not_divide_says_which_would() -> None:
    assert refusal(7, "--train.global_batch=64") == (
        "train.global_batch 64 does not divide over 7 ranks: take a global_batch of 63 or 70, or "
        "1 or 2 or 4 or 8 or 16 or 32 ranks"
    )
    assert refusal(8, "--train.global_batch=3") == (
        "train.global_batch 3 does not divide over 8 ranks: take a global_batch of 8, or 1 or 3 ranks"
    )


def test_a_micro_batch_that_does_not_divide_says_which_would() -> None:
    assert refusal(4, "--train.global_batch=48", "--train.micro_batch=8") == (
        "train.micro_batch 8 does not divide the 12 sequences of each rank (train.global_batch 48 over 4 ranks): "
        "take 1 or 2 or 3 or 4 or 6 or 12"
    )


def test_what_is_recommended_works() -> None:
    for global_batch in (63, 70):
        micro_batch_size(config(f"--train.global_batch={global_batch}"), runtime(7))
    for ranks in (1, 2, 4, 8, 16, 32):
        micro_batch_size(config("--train.global_batch=64"), runtime(ranks))


def test_auto_takes_what_fits_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = count_parameters(config().model, 65)
    whole = parameters * parallel.BYTES_PER_PARAMETER

    def chosen(memory: float, ranks: Runtime, *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(parallel, "device_memory", lambda runtime: memory)
        return choose_strategy(config(*arguments), ranks, vocab_size=65)

    room, tight = 2 * whole, 0.5 * whole
    assert chosen(room, runtime(1), "--parallel.strategy=fsdp") == ("single", "one process")
    strategy, why = chosen(room, runtime(2))
    assert (strategy, why.endswith("every rank holds a whole replica")) == ("ddp", True)
    strategy, why = chosen(tight, runtime(8, per_node=4))
    assert (strategy, why.endswith("sharded within a node, replicated across 2")) == ("hsdp", True)
    assert chosen(tight, runtime(4, per_node=4))[0] == "fsdp"  # one node: nothing to replicate across
    assert chosen(0.1 * whole, runtime(8, per_node=4))[0] == "fsdp"  # a node is too small
    for asked in ("ddp", "fsdp"):
        assert chosen(tight, runtime(8, per_node=4), f"--parallel.strategy={asked}") == (asked, "as asked")
    arguments = ("--parallel.strategy=hsdp", "--parallel.shard=2")
    assert chosen(room, runtime(8, per_node=4), *arguments) == ("hsdp", "as asked, 4 replicas of 2 shards")


def test_hsdp_with_a_group_that_does_not_divide_is_refused() -> None:
    asked = config("--parallel.strategy=hsdp", "--parallel.shard=3")
    with pytest.raises(UsageError, match=r"parallel.shard is 3, which does not divide 8 ranks"):
        choose_strategy(asked, runtime(8), vocab_size=65)


SMALL = ("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=8", "--model.dropout=0.5")


def test_recomputed_activations_change_nothing() -> None:
    tokens_BT = torch.arange(16).reshape(2, 8)
    losses, gradients, names = [], [], []
    for asked in ("false", "true"):
        small = config(*SMALL, f"--parallel.activation_checkpoint={asked}")
        model = build_model(
            small, runtime(1), strategy="single", vocab_size=20, eot_id=None, micro_batch=1, dtype=torch.float32
        )
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
        model = build_model(
            small, runtime(1), strategy="single", vocab_size=20, eot_id=None, micro_batch=1, dtype=torch.float32
        )
        model(tokens_BT, tokens_BT + 1).mean().backward()
        compiled.append(len(graphs))
    assert compiled[0] == compiled[1] > 0


def test_inference_draws_no_dropout_and_training_goes_on() -> None:
    model = build_model(
        config(*SMALL), runtime(1), strategy="single", vocab_size=20, eot_id=None, micro_batch=1, dtype=torch.float32
    )
    tokens_BT = torch.arange(16).reshape(2, 8)
    with inference(model) as gpt:
        first, second = gpt(tokens_BT, tokens_BT + 1), gpt(tokens_BT, tokens_BT + 1)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.training
    assert not torch.equal(model(tokens_BT, tokens_BT + 1), first)
