"""The layout of a run over its ranks: decided once, before a model exists, and equal on every rank."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from distgpt.config import Config, require_divisible_batch
from distgpt.distributed.device import compiles, compute_dtype, device_memory
from distgpt.distributed.memory import USABLE_SHARE, MemoryModel, MemoryParts
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.units import size_text

# Tokens per forward when train.micro_batch is 0: as many as a CPU's caches hold, and enough to keep a GPU busy.
AUTO_MICRO_BATCH_TOKENS = {"cpu": 4096, "mps": 4096, "cuda": 16384}
# A whole replica on each rank is not worth it if it leaves memory for fewer tokens than this.
MIN_EFFICIENT_TOKENS = 4096
SHARDED = ("fsdp", "hsdp", "diloco")


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
    reshard: bool  # sharded: free the gathered weights of a block after its forward pass
    reduce_each: bool  # sharded: exchange gradients after each micro-batch, not once a step
    exact: bool = False  # sum gradients exactly: the same bits on any number of ranks

    @property
    def sharded(self) -> bool:
        return self.strategy in SHARDED

    @property
    def dtype_name(self) -> Literal["float32", "bfloat16"]:
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"


def make_plan(config: Config, runtime: Runtime, *, vocab_size: int) -> Plan:
    """Lay out a run. Raises UsageError, saying which values would divide, if it cannot be laid out over the ranks."""
    require_divisible_batch(config, runtime.world_size)
    independent = independent_replicas(config, runtime)
    memory, room = memory_model(config, runtime, vocab_size), USABLE_SHARE * device_memory(runtime)
    strategy, reason = choose_strategy(config, runtime, vocab_size=vocab_size)
    shards = ranks_per_replica(strategy, config, runtime)
    exact = config.parallel.reduction == "exact"
    if exact:
        _require_exact_possible(strategy, shards, runtime)
    # The compiler may choose other kernels on another number of ranks.
    asked = False if exact and config.train.compile == "auto" else config.train.compile
    compiled, compile_reason = compiles(asked, runtime.device)
    micro_batch = micro_batch_size(config, runtime, lambda size: memory.need(size, shards=shards) <= room)
    keep, reduce = config.parallel.reshard is False, config.parallel.reduce
    if config.parallel.reshard == "auto":
        keep = memory.need(micro_batch, shards=shards, keep_weights=True) <= room
    fits_whole = memory.need(micro_batch, shards=shards, keep_weights=keep, whole_gradients=True) <= room
    return Plan(
        runtime=runtime,
        strategy=strategy,
        reason=reason,
        micro_batch=micro_batch,
        accumulation=config.train.global_batch // (micro_batch * runtime.world_size),
        ranks_per_replica=shards,
        independent_replicas=independent,
        dtype=compute_dtype(config.train.dtype, runtime.device),
        compile=compiled,
        compile_reason=compile_reason,
        reshard=not keep,
        reduce_each=not fits_whole if reduce == "auto" else reduce == "micro_batch",
        exact=exact,
    )


def _require_exact_possible(strategy: str, shards: int, runtime: Runtime) -> None:
    """Raise UsageError if gradients cannot be summed exactly in this layout."""
    asked = "parallel.reduction=exact"
    if strategy == "diloco":
        raise UsageError(f"{asked} needs one model that all ranks train, but diloco trains several: take fsdp or hsdp")
    if strategy in SHARDED and shards == 1:
        raise UsageError(f"{asked} with a single shard in each group: take --parallel.strategy=ddp")
    if runtime.device.type == "mps":
        raise UsageError(f"{asked} needs float64, which Apple GPUs do not have: take --train.device=cpu")


def memory_model(config: Config, runtime: Runtime, vocab_size: int) -> MemoryModel:
    """Return the memory that a rank needs, in the data type that it computes in."""
    return MemoryModel(config, vocab_size, compute_dtype(config.train.dtype, runtime.device).itemsize)


def planned_memory(config: Config, plan: Plan, sequences: int, *, vocab_size: int) -> MemoryParts:
    """Return the memory of a rank in this layout for micro-batches of `sequences`."""
    memory = MemoryModel(config, vocab_size, plan.dtype.itemsize)
    shards, keep_weights, whole_gradients = plan.ranks_per_replica, not plan.reshard, not plan.reduce_each
    return memory.parts(sequences, shards=shards, keep_weights=keep_weights, whole_gradients=whole_gradients)


def micro_batch_size(config: Config, runtime: Runtime, fits: Callable[[int], bool] = lambda size: True) -> int:
    """Return the sequences per forward on one rank: ranks x micro_batch x accumulation steps = global_batch.

    `fits` tells whether a number of sequences fits the memory of a GPU; one is taken in any case. Raises UsageError,
    saying which values would divide.
    """
    require_divisible_batch(config, runtime.world_size)
    if config.train.micro_batch:
        return config.train.micro_batch
    per_rank = config.train.global_batch // runtime.world_size
    limit = AUTO_MICRO_BATCH_TOKENS[runtime.device.type] // config.model.block_size
    sizes = [size for size in range(1, min(per_rank, limit) + 1) if per_rank % size == 0]
    return max((size for size in sizes if runtime.device.type == "cpu" or fits(size)), default=1)


def smallest_efficient_micro_batch(config: Config, runtime: Runtime) -> int:
    """Return the configured micro-batch, or the smallest one that keeps a device busy. Raises UsageError."""
    largest = micro_batch_size(config, runtime)
    if config.train.micro_batch:
        return largest
    sizes = [size for size in range(1, largest + 1) if config.train.global_batch // runtime.world_size % size == 0]
    return min((s for s in sizes if s * config.model.block_size >= MIN_EFFICIENT_TOKENS), default=largest)


def smaller_micro_batch(config: Config, plan: Plan, *, vocab_size: int) -> int | None:
    """Return the largest smaller micro-batch that fits, after that of the plan did not; None if there is none."""
    room = USABLE_SHARE * device_memory(plan.runtime)
    smaller = [size for size in range(1, plan.micro_batch) if plan.micro_batch * plan.accumulation % size == 0]
    fitting = [s for s in smaller if planned_memory(config, plan, s, vocab_size=vocab_size).total <= room]
    return max(fitting or smaller[:1], default=None)


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
    memory, room = memory_model(config, runtime, vocab_size), USABLE_SHARE * device_memory(runtime)
    smallest = smallest_efficient_micro_batch(config, runtime)
    need = memory.need(smallest, shards=1)
    sizes = f"training {smallest} sequences takes {size_text(need)} of {size_text(room)} a rank"
    if need <= room:
        return "ddp", f"{sizes}: every rank holds a whole replica"
    nodes, of_node = runtime.world_size // runtime.local_world_size, runtime.local_world_size
    if nodes > 1 and memory.need(smallest, shards=of_node) <= room and not runtime.world_size % of_node:
        return "hsdp", f"{sizes}: sharded within a node, replicated across {nodes}"
    return "fsdp", f"{sizes}: sharded over all ranks"
