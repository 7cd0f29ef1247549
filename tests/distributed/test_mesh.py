"""The groups of ranks. tests/end_to_end trains with the meshes."""

import pytest
import torch

from distgpt.config import Config, resolve
from distgpt.distributed.plan import independent_replicas, ranks_per_replica
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError


def runtime(ranks: int, per_node: int = 8) -> Runtime:
    return Runtime(0, 0, ranks, per_node, torch.device("cpu"))


def config(strategy: str, shard: int) -> Config:
    return resolve([f"--parallel.strategy={strategy}", f"--parallel.shard={shard}"], {})


@pytest.mark.parametrize("strategy", ["hsdp", "diloco"])
def test_replica_size_is_parallel_shard_or_the_ranks_of_a_node(strategy: str) -> None:
    sizes = [ranks_per_replica(strategy, config(strategy, shard), runtime(16)) for shard in (0, 2, 16)]
    assert sizes == [8, 2, 16]


def test_other_strategies_shard_over_all_ranks_or_none() -> None:
    for strategy, ranks in {"single": 1, "ddp": 1, "fsdp": 16}.items():
        assert ranks_per_replica(strategy, config("auto", 2), runtime(16)) == ranks


@pytest.mark.parametrize("shard", [5, 24])
def test_a_shard_size_that_does_not_divide_lists_sizes_that_do(shard: int) -> None:
    with pytest.raises(UsageError, match=f"parallel.shard is {shard}, .* 12 ranks: take 1 or 2 or 3 or 4 or 6 or 12$"):
        ranks_per_replica("hsdp", config("hsdp", shard), runtime(12))


def test_only_diloco_has_independent_replicas() -> None:
    assert independent_replicas(config("diloco", 0), runtime(16)) == 2
    assert independent_replicas(config("diloco", 1), runtime(2, per_node=2)) == 2
    assert [independent_replicas(config(other, 1), runtime(16)) for other in ("auto", "ddp", "fsdp", "hsdp")] == [
        1,
        1,
        1,
        1,
    ]


def test_diloco_with_one_replica_is_refused_with_the_fix() -> None:
    with pytest.raises(UsageError, match=r"the only one has all of the 8 ranks: take parallel.shard=1$"):
        independent_replicas(config("diloco", 0), runtime(8))
    with pytest.raises(UsageError, match=r"the only one has all of the 1 ranks: .* under torchrun on several devices$"):
        independent_replicas(config("diloco", 0), runtime(1, per_node=1))
