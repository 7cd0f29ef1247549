"""Build a model and spread it over the ranks: activation checkpointing -> compile -> FSDP2, HSDP or DDP."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distgpt.config import Config
from distgpt.distributed.device import set_numerics
from distgpt.distributed.mesh import build_mesh
from distgpt.distributed.plan import Plan
from distgpt.model.gpt import GPT


def build_model(config: Config, plan: Plan, *, vocab_size: int, eot_id: int | None) -> nn.Module:
    """Build the GPT with its initial weights, spread over the ranks. Every plan gives the same weights.

    Sets the process to the precision and kernels that the config asks for.
    """
    set_numerics(config.train, exact=plan.exact)
    with torch.device("meta" if plan.sharded else "cpu"):
        model = GPT(config.model, vocab_size, eot_id)
    if config.parallel.activation_checkpoint:
        recompute_blocks(model)
    if plan.compile:
        _compile(model)
    if plan.sharded:
        return _shard(model, config, plan)
    model.init_weights(config.run.seed)
    model.to(plan.runtime.device)
    if plan.strategy == "single" or plan.exact:
        return model
    device_ids = [plan.runtime.local_rank] if plan.runtime.device.type == "cuda" else None
    replicated = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    _warm_up_ddp_buckets(replicated, plan, block_size=config.model.block_size)
    return replicated


@contextmanager
def inference(model: nn.Module) -> Iterator[GPT]:
    """Yield the GPT itself, in eval mode and without gradients. A sharded one needs every rank in each forward."""
    gpt = unwrap_model(model)
    gpt.eval()
    with torch.no_grad():
        yield gpt
    gpt.train()
    reshard(gpt)


def reshard(model: nn.Module) -> None:
    """Free gathered weights, so that parameters are shards again, where no backward pass will do so."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unwrap_model(model: nn.Module) -> GPT:
    """Return the GPT inside of DDP, or `model` itself if it is one."""
    module = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(module, GPT):
        raise TypeError(f"expected a GPT, got {type(module).__name__}")
    return module


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Enter mixed precision: matrix products in `dtype`, weights and reductions in float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _shard(model: GPT, config: Config, plan: Plan) -> nn.Module:
    mesh = build_mesh(plan)
    # Products gather their weights in the compute dtype; the residual stream and embeddings stay float32 as autocast
    # has it under DDP, so that the strategy does not change what is learned. Norms are rounded with the products'
    # weights, which is not exact.
    in_products = MixedPrecisionPolicy(
        param_dtype=None if plan.exact or plan.dtype == torch.float32 else plan.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    units = [fully_shard(b, mesh=mesh, mp_policy=in_products, reshard_after_forward=plan.reshard) for b in model.blocks]
    if not config.model.tied_head:
        # Its backward pass follows at once.
        units.append(fully_shard(model.head, mesh=mesh, mp_policy=in_products, reshard_after_forward=False))
    # Embeddings, and a head that is tied to them.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])
    model.to_empty(device=plan.runtime.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            full = model.initial_value(name, seed=config.run.seed).to(plan.runtime.device)
            # src_data_rank=None: every rank has the full value and cuts its own part, nothing is sent.
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
    return model


def _compile(model: GPT) -> None:
    """Compile each block, the last norm, and the head with the loss. All blocks share one graph."""
    # Otherwise torch cuts the graph of a block wherever a bucket of DDP is full, and fuses nothing across the cut.
    torch._dynamo.config.optimize_ddp = False
    for module in (*model.blocks, model.norm, model.head):
        module.compile()
    model.blocks_are_compiled = True


def recompute_blocks(model: GPT) -> None:
    """Let each block keep its input alone, and compute its activations again in the backward pass."""
    for block in model.blocks:
        # Replacing the bound forward, not the module, keeps the names of parameters.
        block.forward = _recompute(block.forward)


def _recompute(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `forward` so that its activations are computed again in the backward pass."""

    # torch.compile needs a function as a block's forward: it silently leaves a functools.partial uncompiled.
    def recomputed(*arguments: Any) -> Tensor:
        activations: Tensor = checkpoint(forward, *arguments, use_reentrant=False)
        return activations

    return recomputed


def _warm_up_ddp_buckets(model: DistributedDataParallel, plan: Plan, *, block_size: int) -> None:
    """Run one backward pass and drop its gradients: DDP rebuilds its buckets after the first one.

    From three ranks on, the order in which an all-reduce adds up a value depends on its place in a bucket, so a
    resumed run's first step would round differently from the same step in a run that was never interrupted.
    """
    tokens_BT = torch.zeros(plan.micro_batch, block_size, dtype=torch.int64, device=plan.runtime.device)
    with autocast(plan.runtime.device, plan.dtype):
        loss = model(tokens_BT, tokens_BT).mean()
    loss.backward()
    model.zero_grad()
