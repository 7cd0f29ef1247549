"""AdamW whose updates do not depend, to the bit, on how the parameters are sharded."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class ExactAdamW(torch.optim.AdamW):
    """AdamW with the same updates for a whole tensor and for its shards.

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


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
