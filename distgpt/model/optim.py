"""The optimizer: parameter groups, AdamW with or without Muon, and the learning rate as a pure function of the step.

AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from distgpt.config import OptimConfig
from distgpt.model.adamw import ExactAdamW
from distgpt.model.muon import Muon, block_matrices

# Devices with a fused kernel that updates all parameters at once, sharded ones (DTensor) included, in float32.
FUSED_DEVICES = ("cuda", "mps", "cpu")


def parameter_groups(
    model: nn.Module, weight_decay: float, *, without: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Return two groups: matrices and embeddings with weight decay, biases and norms without (GPT-3, nanoGPT).

    `without`: parameters to leave out. For a sharded parameter the number of dims of the whole tensor counts, which is
    a DTensor's ndim.
    """
    left_out = set(without)
    parameters = [p for p in model.parameters() if p.requires_grad and p not in left_out]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module,
    config: OptimConfig,
    device_type: str,
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool = False,
) -> torch.optim.Optimizer:
    """Build AdamW over the model's parameters, or Muon over the matrices of its blocks and AdamW over the others.

    AdamW is fused if the device has a fused kernel. The learning rate is the peak, optim.lr, until the caller sets
    another one with set_lr. Call it after sharding. `dtype`: of the products in Muon. `exact`: updates do not depend on
    the sharding.
    """
    matrices = block_matrices(model) if config.name == "muon" else []
    groups, betas = parameter_groups(model, config.weight_decay, without=matrices), (config.beta1, config.beta2)
    fused = True if device_type in FUSED_DEVICES else None
    adamw = (
        ExactAdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
        if exact
        else torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
    )
    if config.name == "adamw":
        return adamw
    return Muon(matrices, adamw, weight_decay=config.weight_decay, dtype=dtype)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the learning rate of all parameter groups and return it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def lr_at(step: int, config: OptimConfig, steps: int) -> float:
    """Return the learning rate of the update that follows `step` completed updates, in a run of `steps` updates.

    The rate first warms up in equal increments, from lr / (warmup_steps + 1) at step 0 to lr at step warmup_steps.
    Then, by schedule:
    constant: it stays lr;
    cosine: it falls along half a cosine period to min_lr at the last step (SGDR without restarts, Loshchilov & Hutter
    2016, arXiv:1608.03983);
    wsd: it stays lr and falls linearly over the last decay_fraction of the steps to min_lr at the last one (warm-up,
    stable, decay: MiniCPM, Hu et al. 2024, arXiv:2404.06395).
    After the last step it does not change any more.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * _progress(step, config.warmup_steps, steps - 1)))
    elif config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * steps))
        last_stable = max(steps - 1 - decay_steps, config.warmup_steps)
        remaining = 1.0 - _progress(step, last_stable, steps - 1)
    else:
        remaining = 1.0
    return config.min_lr + (config.lr - config.min_lr) * remaining


def _progress(step: int, start: int, end: int) -> float:
    """Return 0 up to `start`, 1 from `end` on, and rise linearly between them."""
    if step >= end:
        return 1.0
    return max(0, step - start) / (end - start)
