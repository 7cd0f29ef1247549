"""The optimizer: parameter groups, AdamW, and the learning rate as a pure function of the step.

AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distgpt.config import OptimConfig

# Devices with a fused kernel that updates all parameters at once, sharded ones (DTensor) included, in float32.
FUSED_DEVICES = ("cuda", "mps", "cpu")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices and embeddings with weight decay, biases and norms without (GPT-3, nanoGPT).

    For a sharded parameter the number of dims of the whole tensor counts, which is a DTensor's ndim.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


class ExactAdamW(torch.optim.AdamW):
    """AdamW whose updates do not depend, to the bit, on how the parameters are sharded.

    A fused kernel on a CPU may round the last elements of a tensor, which do not fill a vector, in another way than the
    others. Here each operation rounds once. State and attributes are those of the fused AdamW.
    """

    grad_scale: Tensor | None = None  # gradients are divided by it
    found_inf: Tensor | None = None  # 1.0: leave weights and moments as they are

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        if self.found_inf is not None and self.found_inf.item():
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step, lr, (beta1, beta2) = state["step"].item(), group["lr"], group["betas"]
        assert parameter.grad is not None
        weight, gradient, mean, square = map(
            local_shard, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        )
        gradient = gradient / (1.0 if self.grad_scale is None else self.grad_scale)
        mean.mul_(beta1).add_(gradient * (1 - beta1))
        square.mul_(beta2).add_(gradient.square_().mul_(1 - beta2))
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.mul_(1 - lr * group["weight_decay"]).sub_((mean * (lr / (1 - beta1**step))).div_(denominator))


def build_optimizer(
    model: nn.Module, config: OptimConfig, device_type: str, *, exact: bool = False
) -> torch.optim.AdamW:
    """Build AdamW over the model's parameters, fused if the device has a fused kernel. Call it after sharding.

    The learning rate is the peak, optim.lr, until the caller sets another one with set_lr. `exact`: updates do not
    depend on the sharding.
    """
    groups, betas = parameter_groups(model, config.weight_decay), (config.beta1, config.beta2)
    if exact:
        return ExactAdamW(groups, lr=config.lr, betas=betas, eps=config.eps)
    fused = True if device_type in FUSED_DEVICES else None
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
