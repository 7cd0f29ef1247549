"""Bytes that a step sends over each link. bench/scaling.py counts them on real links.

A ring all-gather or reduce-scatter of X bytes over n ranks lets each rank send (n - 1) / n X; an all-reduce is one of
each. A ring in rank order leaves each node once, so a node sends to the next one what a single rank sends.
"""

from dataclasses import dataclass

from distgpt.config import Config
from distgpt.distributed.memory import EXACT_SUM_BYTES
from distgpt.distributed.plan import Plan
from distgpt.model.gpt import meta_model


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step sends."""

    rank: float  # by each rank to any other
    within: float  # by each rank over the link to the others of its node
    between: float  # by each node over its network


def shard_traffic(size: float, *, shards: int, per_node: int) -> Traffic:
    """Return the traffic of all-gathers and reduce-scatters of `size` bytes among the ranks of a shard group."""
    sent = size * (shards - 1) / shards
    within = sent if min(shards, per_node) > 1 else 0.0
    return Traffic(sent, within, sent if shards > per_node else 0.0)


def replica_traffic(size: float, *, ranks: int, shards: int, per_node: int) -> Traffic:
    """Return the traffic of an all-reduce across replicas. Each rank has one of `shards` of its `size` bytes."""
    replicas, on_node = ranks // shards, max(1, per_node // shards)
    sent = 2 * size / shards * (replicas - 1) / replicas
    groups = min(shards, per_node)  # that leave a node
    return Traffic(sent, sent if on_node > 1 else 0.0, sent * groups if ranks > per_node else 0.0)


def gathered_bytes(blocks: float, root: float, *, micro_batches: int, reshard: bool) -> float:
    """Return the bytes of a step's all-gathers. `reshard`: blocks twice a micro-batch, the root once; else all once."""
    return micro_batches * (2 * blocks + root) if reshard else blocks + root


def step_traffic(config: Config, plan: Plan, *, vocab_size: int) -> tuple[Traffic, Traffic]:
    """Return what a step sends within the groups of shards and across the replicas; with diloco, a mean over steps."""
    model, runtime = meta_model(config.model, vocab_size), plan.runtime
    blocks = sum(p.numel() for p in model.blocks.parameters())
    head = sum(p.numel() for p in model.head.parameters())
    whole = sum(p.numel() for p in model.parameters())
    itemsize = 4 if plan.exact else plan.dtype.itemsize
    gathered = gathered_bytes(  # products gather their weights in the data type that they compute in
        itemsize * blocks,
        4 * (whole - blocks - head) + itemsize * head,
        micro_batches=plan.accumulation,
        reshard=plan.reshard,
    )
    summed = (EXACT_SUM_BYTES if plan.exact else 4) * whole
    reduced = summed * (plan.accumulation if plan.reduce_each else 1)
    rarely = config.parallel.outer_every if plan.strategy == "diloco" else 1
    shards, per_node = plan.ranks_per_replica, runtime.local_world_size
    return (
        shard_traffic(gathered + reduced, shards=shards, per_node=per_node),
        replica_traffic(summed / rarely, ranks=runtime.world_size, shards=shards, per_node=per_node),
    )
