"""The layout of a run over its ranks: decided once, before a model exists, and equal on every rank."""

from dataclasses import dataclass

import torch

from distgpt.config import Config, require_divisible_batch
from distgpt.distributed.device import compiles, compute_dtype, device_memory
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.model.gpt import count_parameters

# float32 weights, gradients and AdamW's two moments
BYTES_PER_PARAMETER = 16
# The share of a device's memory that a replica may take; the rest is for activations.
REPLICA_SHARE = 0.6
# Tokens per forward when train.micro_batch is 0: as many as a CPU's caches hold, and enough to keep a GPU busy.
AUTO_MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Plan:
    """The layout of a run. Equal on all ranks except for `runtime`, which describes this one."""

    runtime: Runtime
    strategy: str  # single, ddp, fsdp, hsdp or diloco
    reason: str  # for that strategy, to be shown to the user
    micro_batch: int  # sequences per forward on one rank
    accumulation: int  # micro-batches of a rank in a step
    ranks_per_replica: int  # ranks that hold the shards of one replica
    independent_replicas: int  # replicas that train independently between outer steps (diloco), else 1
    dtype: torch.dtype  # of matrix products; weights are float32
    compile: bool  # blocks, norm, head and loss
    compile_reason: str  # to be shown to the user; may be empty


def make_plan(config: Config, runtime: Runtime, *, vocab_size: int) -> Plan:
    """Lay out a run. Raises UsageError, saying which values would divide, if it cannot be laid out over the ranks."""
    micro_batch = micro_batch_size(config, runtime)
    independent = independent_replicas(config, runtime)
    strategy, reason = choose_strategy(config, runtime, vocab_size=vocab_size)
    compiled, compile_reason = compiles(config.train.compile, runtime.device)
    return Plan(
        runtime=runtime,
        strategy=strategy,
        reason=reason,
        micro_batch=micro_batch,
        accumulation=config.train.global_batch // (micro_batch * runtime.world_size),
        ranks_per_replica=ranks_per_replica(strategy, config, runtime),
        independent_replicas=independent,
        dtype=compute_dtype(config.train.dtype, runtime.device),
        compile=compiled,
        compile_reason=compile_reason,
    )


def micro_batch_size(config: Config, runtime: Runtime) -> int:
    """Return the sequences per forward on one rank: ranks x micro_batch x accumulation steps = global_batch.

    Raises UsageError, saying which values would divide.
    """
    require_divisible_batch(config, runtime.world_size)
    if config.train.micro_batch:
        return config.train.micro_batch
    per_rank = config.train.global_batch // runtime.world_size
    limit = AUTO_MICRO_BATCH_TOKENS[runtime.device.type] // config.model.block_size
    return max(m for m in range(1, per_rank + 1) if per_rank % m == 0 and m <= max(1, limit))


def ranks_per_replica(strategy: str, config: Config, runtime: Runtime) -> int:
    """Return how many ranks hold a replica together. hsdp, diloco: parallel.shard, or the ranks of one node.

    Raises UsageError naming the sizes that divide the ranks.
    """
    ranks = runtime.world_size
    if strategy not in ("hsdp", "diloco"):
        return ranks if strategy == "fsdp" else 1
    size = config.parallel.shard or runtime.local_world_size
    if ranks % size:
        divisors = " or ".join(str(s) for s in range(1, ranks + 1) if ranks % s == 0)
        raise UsageError(f"parallel.shard is {size}, which does not divide {ranks} ranks: take {divisors}")
    return size


def independent_replicas(config: Config, runtime: Runtime) -> int:
    """Return how many replicas train independently between outer steps: those of diloco, else one.

    Raises UsageError if diloco had only one.
    """
    if config.parallel.strategy != "diloco":
        return 1
    ranks, size = runtime.world_size, ranks_per_replica("diloco", config, runtime)
    if size == ranks:
        fix = "take parallel.shard=1" if ranks > 1 else "start it under torchrun on several devices"
        raise UsageError(f"diloco needs at least two replicas, and the only one has all of the {ranks} ranks: {fix}")
    return ranks // size


def choose_strategy(config: Config, runtime: Runtime, *, vocab_size: int) -> tuple[str, str]:
    """Return the strategy and the reason for it, to be shown to the user. "single" means one process."""
    asked = config.parallel.strategy
    if not runtime.distributed:
        return "single", "one process"
    if asked in ("hsdp", "diloco"):
        size = ranks_per_replica(asked, config, runtime)
        why = f"as asked, {runtime.world_size // size} replicas of {size} shards"
        return asked, f"{why} that synchronize every {config.parallel.outer_every} steps" if asked == "diloco" else why
    if asked != "auto":
        return asked, "as asked"
    need = BYTES_PER_PARAMETER * count_parameters(config.model, vocab_size)
    room = REPLICA_SHARE * device_memory(runtime)
    sizes = f"weights, gradients and moments take {need / 2**30:.1f} of {room / 2**30:.1f} GiB a rank"
    if need <= room:
        return "ddp", f"{sizes}: every rank holds a whole replica"
    nodes = runtime.world_size // runtime.local_world_size
    if nodes > 1 and need / runtime.local_world_size <= room and not runtime.world_size % runtime.local_world_size:
        return "hsdp", f"{sizes}: sharded within a node, replicated across {nodes}"
    return "fsdp", f"{sizes}: sharded over all ranks"
