"""The layout of a run over its ranks."""

import pytest
import torch

from distgpt.config import Config, resolve
from distgpt.distributed import plan
from distgpt.distributed.memory import USABLE_SHARE, MemoryModel
from distgpt.distributed.plan import choose_strategy, make_plan, micro_batch_size, smaller_micro_batch
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError


def runtime(ranks: int, per_node: int | None = None) -> Runtime:
    return Runtime(0, 0, ranks, per_node or ranks, torch.device("cpu"))


def config(*arguments: str) -> Config:
    return resolve(arguments, {})


def refusal(ranks: int, *arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        micro_batch_size(config(*arguments), runtime(ranks))
    return str(caught.value)


def test_micro_batch_is_the_configured_one() -> None:
    asked = config("--train.global_batch=24", "--train.micro_batch=3")
    assert [micro_batch_size(asked, runtime(ranks)) for ranks in (1, 2, 4, 8)] == [3, 3, 3, 3]


def test_automatic_micro_batch_is_the_largest_that_divides_and_fits() -> None:
    limit = plan.AUTO_MICRO_BATCH_TOKENS["cpu"] // 256
    for ranks, expected in {1: 16, 2: 12, 3: 16, 8: 6, 48: 1}.items():
        found = micro_batch_size(config("--train.global_batch=48", "--model.block_size=256"), runtime(ranks))
        assert found == expected <= limit
    assert micro_batch_size(config("--model.block_size=100000"), runtime(1)) == 1  # one sequence must fit


def test_a_run_on_an_apple_gpu_fits_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    apple = Runtime(0, 0, 1, 1, torch.device("mps"))
    asked = config("--train.global_batch=64", "--model.block_size=256")
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 2**34)
    laid_out = make_plan(asked, apple, vocab_size=65)
    assert (laid_out.strategy, laid_out.micro_batch, laid_out.compile) == ("single", 16, False)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 2**20)
    assert make_plan(asked, apple, vocab_size=65).micro_batch == 1


def test_a_global_batch_that_does_not_divide_lists_values_that_do() -> None:
    assert refusal(7, "--train.global_batch=64") == (
        "train.global_batch 64 does not divide over 7 ranks: take a global_batch of 63 or 70, or "
        "1 or 2 or 4 or 8 or 16 or 32 ranks"
    )
    assert refusal(8, "--train.global_batch=3") == (
        "train.global_batch 3 does not divide over 8 ranks: take a global_batch of 8, or 1 or 3 ranks"
    )


def test_a_micro_batch_that_does_not_divide_lists_values_that_do() -> None:
    assert refusal(4, "--train.global_batch=48", "--train.micro_batch=8") == (
        "train.micro_batch 8 does not divide the 12 sequences of each rank (train.global_batch 48 over 4 ranks): "
        "take 1 or 2 or 3 or 4 or 6 or 12"
    )


def test_recommended_values_work() -> None:
    for global_batch in (63, 70):
        micro_batch_size(config(f"--train.global_batch={global_batch}"), runtime(7))
    for ranks in (1, 2, 4, 8, 16, 32):
        micro_batch_size(config("--train.global_batch=64"), runtime(ranks))


def test_auto_strategy_fits_the_memory_and_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MemoryModel(config("--train.dtype=float32"), 65, 4)
    whole = model.need(16, shards=1) / USABLE_SHARE  # 4,096 tokens

    def chosen(memory: float, ranks: Runtime, *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(plan, "device_memory", lambda runtime: memory)
        asked = config("--train.dtype=float32", "--train.global_batch=128", *arguments)
        return choose_strategy(asked, ranks, vocab_size=65)

    room, tight = 1.01 * whole, model.need(16, shards=4) / USABLE_SHARE * 1.01
    assert tight < 0.99 * whole
    assert chosen(room, runtime(1), "--parallel.strategy=fsdp") == ("single", "one process")
    strategy, why = chosen(room, runtime(2))
    assert (strategy, why.endswith("every rank holds a whole replica")) == ("ddp", True)
    strategy, why = chosen(tight, runtime(8, per_node=4))
    assert (strategy, why.endswith("sharded within a node, replicated across 2")) == ("hsdp", True)
    assert chosen(tight, runtime(4, per_node=4))[0] == "fsdp"  # one node: nothing to replicate across
    assert chosen(0.99 * tight, runtime(8, per_node=4))[0] == "fsdp"  # a node is too small
    for asked in ("ddp", "fsdp"):
        assert chosen(tight, runtime(8, per_node=4), f"--parallel.strategy={asked}") == (asked, "as asked")
    arguments = ("--parallel.strategy=hsdp", "--parallel.shard=2")
    assert chosen(room, runtime(8, per_node=4), *arguments) == ("hsdp", "as asked, 4 replicas of 2 shards")


def test_hsdp_with_a_shard_size_that_does_not_divide_is_refused() -> None:
    asked = config("--parallel.strategy=hsdp", "--parallel.shard=3")
    with pytest.raises(UsageError, match=r"parallel.shard is 3, which does not divide 8 ranks"):
        choose_strategy(asked, runtime(8), vocab_size=65)


GPU = torch.device("cuda", 0)


def planned(memory: float, ranks: int, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> plan.Plan:
    """Plan for GPUs with so many GiB."""
    monkeypatch.setattr(plan, "device_memory", lambda runtime: memory * 2**30)
    monkeypatch.setattr(plan, "compiles", lambda asked, device: (True, "compiled"))
    asked = config("--train.dtype=bfloat16", "--train.global_batch=512", *arguments)
    return make_plan(asked, Runtime(0, 0, ranks, ranks, GPU), vocab_size=50_257)


def test_the_micro_batch_of_a_gpu_is_the_largest_that_fits_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(memory: float, *arguments: str) -> int:
        return planned(memory, 1, monkeypatch, *arguments).micro_batch

    assert size(80, "gpt2-124m") == size(24, "gpt2-124m") == 16
    assert size(79, "gpt2-1558m") == 8  # 16 would take 78 GiB
    assert size(141, "gpt2-1558m") == size(79, "gpt2-1558m", "--parallel.activation_checkpoint") == 16
    assert size(12, "gpt2-124m") == 8
    assert size(1, "gpt2-124m") == 1
    assert size(1, "gpt2-124m", "--train.micro_batch=4") == 4


def test_auto_counts_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(79, 8, monkeypatch, "gpt2-1558m").strategy == "ddp"
    assert planned(39, 8, monkeypatch, "gpt2-1558m").strategy == "fsdp"  # 26 GiB of state leave too little
    assert planned(39, 8, monkeypatch, "gpt2-1558m", "--parallel.activation_checkpoint").strategy == "ddp"


def test_fsdp_keeps_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(memory: float, *arguments: str) -> tuple[int, bool, bool]:
        found = planned(memory, 8, monkeypatch, "modern-7b", "--parallel.strategy=fsdp", *arguments)
        return found.micro_batch, not found.reshard, not found.reduce_each

    large, middle, small = kept(79), kept(60), kept(40)
    assert large == (4, True, True)
    assert middle == (4, True, False)
    assert small == (4, False, False)
    asked = kept(40, "--parallel.reshard=false", "--parallel.reduce=step")
    assert asked[1:] == (True, True)


def test_after_out_of_memory_a_smaller_micro_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def smaller(memory: float, *arguments: str) -> int | None:
        asked = ("gpt2-124m", "--train.dtype=bfloat16", *arguments)
        found = planned(memory, 1, monkeypatch, *asked)
        return smaller_micro_batch(config("--train.global_batch=512", *asked), found, vocab_size=50_257)

    assert smaller(12, "--train.micro_batch=64") == 8
    assert smaller(80, "--train.micro_batch=16") == 8  # another program may use the GPU
    assert smaller(1, "--train.micro_batch=16") == 1
    assert smaller(1, "--train.micro_batch=1") is None
