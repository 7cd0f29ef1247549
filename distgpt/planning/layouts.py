"""The memory and the time of a step in each layout of a run, on devices that this machine need not have."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from distgpt.config import Config
from distgpt.distributed.device import compute_dtype, device_memory, share_of_cpus
from distgpt.distributed.memory import USABLE_SHARE, MemoryParts
from distgpt.distributed.plan import (
    Plan,
    make_plan,
    memory_model,
    planned_memory,
    ranks_per_replica,
    smallest_efficient_micro_batch,
)
from distgpt.distributed.runtime import Runtime
from distgpt.model.gpt import meta_model
from distgpt.planning.devices import LINK_EFFICIENCY, Device
from distgpt.planning.traffic import Traffic, step_traffic
from distgpt.telemetry.peaks import device_peak_flops, named_peak_flops

GIB = 2**30
CPU_MEASUREMENTS = 3
# The backward pass takes about two thirds of a micro-batch. DDP exchanges gradients during the last one.
BACKWARD_SHARE = 2 / 3
Strategy = Literal["ddp", "fsdp", "hsdp", "diloco"]


@dataclass(frozen=True)
class Cluster:
    """Nodes with equal devices, one rank on each device."""

    name: str
    device: Device
    nodes: int
    per_node: int
    memory: float  # bytes of a device
    peak: float  # FLOP/s of a device in `dtype`
    dtype: Literal["float32", "bfloat16"]
    mfu: float  # assumed

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def runtime(self) -> Runtime:
        """The first rank, on a device that this machine need not have."""
        kind = torch.device("cpu") if self.name == "cpu" else torch.device("cuda", 0)
        return Runtime(0, 0, self.ranks, self.per_node, kind, memory=self.memory)

    def resized(self, ranks: int) -> "Cluster":
        """Return a cluster of `ranks` such devices, in nodes of at most eight."""
        per_node = min(ranks, 8)
        return replace(self, nodes=ranks // per_node, per_node=per_node)


@dataclass(frozen=True)
class Layout:
    """A strategy on a cluster: what a rank holds, sends, and takes for a step."""

    strategy: str  # single, ddp, fsdp, hsdp or diloco
    activation_checkpoint: bool
    micro_batch: int
    accumulation: int
    ranks_per_replica: int
    memory: MemoryParts
    fits: bool
    largest_micro_batch: int  # that fits, 0: not even one sequence
    efficient: bool  # the micro-batch keeps a device busy
    bytes_within_node: float  # a step, sent by each rank to others of its node
    bytes_between_nodes: float  # a step, sent by each node
    step_seconds: float
    mfu: float


def make_cluster(
    name: str,
    device: Device,
    config: Config,
    *,
    nodes: int,
    per_node: int,
    network: float | None = None,
    mfu: float | None = None,
) -> Cluster:
    """Describe a cluster of one kind of device. `network`, `mfu`: in place of the assumed ones. Measures this CPU."""
    device = replace(device, network=network or device.network)
    if name == "cpu":
        cpu = torch.device("cpu")
        dtype = compute_dtype(config.train.dtype, cpu)
        memory = device_memory(Runtime(0, 0, per_node, per_node, cpu))
        torch.set_num_threads(share_of_cpus(per_node))
        # The first products of a process are slow.
        peak = max(device_peak_flops(cpu, dtype) or 0.0 for _ in range(CPU_MEASUREMENTS))
    else:
        has_bfloat16 = named_peak_flops(device.product, torch.bfloat16, tf32=False) is not None
        dtype = torch.float32 if config.train.dtype == "float32" or not has_bfloat16 else torch.bfloat16
        memory = device.memory * GIB
        peak = named_peak_flops(device.product, dtype, tf32=config.train.tf32) or 0.0
    return Cluster(
        name=name,
        device=device,
        nodes=nodes,
        per_node=per_node,
        memory=memory,
        peak=peak,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        mfu=mfu or device.mfu,
    )


def layouts(config: Config, cluster: Cluster, *, vocab_size: int) -> list[Layout]:
    """Return each strategy, without and with activation checkpointing. Raises UsageError if nothing divides."""
    return [
        _layout(_with_layout(config, cluster, strategy, recompute), cluster, vocab_size=vocab_size)
        for strategy in _strategies(config, cluster)
        for recompute in (False, True)
    ]


def best_layout(config: Config, candidates: list[Layout]) -> Layout | None:
    """Return the fastest layout that fits, with an efficient micro-batch if there is one; the first of equal ones.

    A strategy that the config asks for is kept. None: nothing fits.
    """
    asked = config.parallel.strategy
    fitting = [c for c in candidates if c.fits and (asked in ("auto", c.strategy) or c.strategy == "single")]
    fitting = [c for c in fitting if c.efficient] or fitting
    fastest = min((c.step_seconds for c in fitting), default=0.0)
    return next((c for c in fitting if c.step_seconds <= 1.01 * fastest), None)


def step_seconds(config: Config, plan: Plan, device: Device, *, vocab_size: int, peak: float, mfu: float) -> float:
    """Return the seconds of a step: its products, and the communication that they cannot hide.

    `peak`: FLOP/s of a device. All-gathers and reduce-scatters run beside the products of every micro-batch that has
    them, the all-reduce beside the backward pass of the last one.
    """
    model = meta_model(config.model, vocab_size)
    head = 6.0 * vocab_size * config.model.n_embd
    flops = model.flops_per_token()
    if config.parallel.activation_checkpoint:  # a third is the forward pass, which the blocks take twice
        flops += (model.flops_per_token() - head) / 3
    if config.model.loss_chunk:
        flops += head / 3
    tokens = plan.accumulation * plan.micro_batch * config.model.block_size
    compute = tokens * flops / (peak * mfu)
    shards, replicas = (_seconds_of(t, device) for t in step_traffic(config, plan, vocab_size=vocab_size))
    beside_shards = compute if plan.reshard or plan.reduce_each else compute / plan.accumulation
    beside_replicas = BACKWARD_SHARE * compute / plan.accumulation
    return compute + max(0.0, shards - beside_shards) + max(0.0, replicas - beside_replicas)


def _seconds_of(traffic: Traffic, device: Device) -> float:
    network = device.network * 1e9 / 8
    return max(traffic.within / (device.link * 1e9), traffic.between / network) / LINK_EFFICIENCY


def _strategies(config: Config, cluster: Cluster) -> Iterator[Strategy]:
    yield "ddp"
    if cluster.ranks > 1:
        if 1 < ranks_per_replica("hsdp", config, cluster.runtime) < cluster.ranks:
            yield "hsdp"
        yield "fsdp"
    if config.parallel.strategy == "diloco":
        yield "diloco"


def _with_layout(config: Config, cluster: Cluster, strategy: Strategy, recompute: bool) -> Config:
    parallel = replace(config.parallel, strategy=strategy, activation_checkpoint=recompute)
    return replace(config, parallel=parallel, train=replace(config.train, dtype=cluster.dtype))


def _layout(config: Config, cluster: Cluster, *, vocab_size: int) -> Layout:
    runtime, room = cluster.runtime, USABLE_SHARE * cluster.memory
    plan = make_plan(config, runtime, vocab_size=vocab_size)
    memory = planned_memory(config, plan, plan.micro_batch, vocab_size=vocab_size)
    model = memory_model(config, runtime, vocab_size)
    shards, replicas = step_traffic(config, plan, vocab_size=vocab_size)
    seconds = step_seconds(config, plan, cluster.device, vocab_size=vocab_size, peak=cluster.peak, mfu=cluster.mfu)
    flops = config.train.global_batch * config.model.block_size * meta_model(config.model, vocab_size).flops_per_token()
    return Layout(
        strategy=plan.strategy,
        activation_checkpoint=config.parallel.activation_checkpoint,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        ranks_per_replica=plan.ranks_per_replica,
        memory=memory,
        fits=memory.total <= room,
        largest_micro_batch=bisect_right(
            range(1, 2**16), room, key=lambda size: model.need(size, shards=plan.ranks_per_replica)
        ),
        efficient=plan.micro_batch >= smallest_efficient_micro_batch(config, runtime),
        bytes_within_node=shards.within + replicas.within,
        bytes_between_nodes=shards.between + replicas.between,
        step_seconds=seconds,
        mfu=flops / (cluster.ranks * cluster.peak * seconds),
    )
