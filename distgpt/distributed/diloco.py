"""DiLoCo: replicas that train independently and synchronize every H steps (Douillard et al. 2023, arXiv:2311.08105).

Each replica takes steps on its own part of every global batch. After every H-th step, the mean over replicas of
(shared weights - own weights) is the gradient of an outer step on the shared weights, SGD with Nesterov momentum. All
replicas go on from the result. Weights cross the slow links between replicas once in H steps, gradients never.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distgpt.config import Config
from distgpt.distributed.mesh import same_shard_group
from distgpt.distributed.plan import Plan
from distgpt.model.adamw import local_shard
from distgpt.model.gpt import GPT


class OuterOptimizer:
    """The shared weights of all replicas and the momentum of the outer steps, sharded as the replica is."""

    def __init__(self, model: GPT, config: Config, plan: Plan) -> None:
        """Start from the initial weights of `model`. All ranks call it together."""
        self.replica = plan.runtime.rank // plan.ranks_per_replica
        self._replicas, self._config = plan.independent_replicas, config.parallel
        self._own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._shared = {name: own.clone() for name, own in self._own.items()}
        self._momentum = {name: torch.zeros_like(own) for name, own in self._own.items()}
        self._shard_group = same_shard_group(plan, timedelta(seconds=config.health.collective_timeout))

    @torch.no_grad()
    def step(self) -> None:
        """Take the outer step; afterwards all replicas have the same weights. All ranks call it."""
        own, shared, momentum = (
            [local_shard(t) for t in ts.values()] for ts in (self._own, self._shared, self._momentum)
        )
        # One message, since links between replicas often have a high latency.
        outer_gradient = torch.cat([(s - o).flatten() for s, o in zip(shared, own, strict=True)])
        dist.all_reduce(outer_gradient, group=self._shard_group)
        outer_gradient /= self._replicas
        gradients = torch.split(outer_gradient, [o.numel() for o in own])
        for own_weight, shared_weight, velocity, flat in zip(own, shared, momentum, gradients, strict=True):
            gradient = flat.view_as(shared_weight)
            velocity.mul_(self._config.outer_momentum).add_(gradient)
            shared_weight.sub_(gradient.add(velocity, alpha=self._config.outer_momentum), alpha=self._config.outer_lr)
            own_weight.copy_(shared_weight)

    def reset(self) -> None:
        """Start anew from the weights of the model, which are equal in all replicas, without momentum."""
        for name, own in self._own.items():
            self._shared[name].copy_(own)
            self._momentum[name].zero_()

    def checkpoint_tensors(self, replica: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors of a checkpoint: the shared weights as its model, the momentum, and those of `replica`."""
        return {"model": self._shared, "outer": self._momentum, "replica": {str(self.replica): replica}}
