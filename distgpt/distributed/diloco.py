"""DiLoCo: replicas that learn apart and meet every H steps (Douillard et al. 2023, arXiv:2311.08105).

Each replica takes AdamW steps on its own part of every global batch. After every H-th step the mean of the ways that
they went is the gradient of an outer step, SGD with Nesterov momentum, on weights that all have in common, and from
there they all go on. Weights cross the slow links between replicas once in H steps, and no gradients at all.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from distgpt.config import Config
from distgpt.distributed.plan import ranks_per_replica
from distgpt.distributed.runtime import Runtime
from distgpt.model.gpt import GPT


class OuterOptimizer:
    """The common weights of all replicas and the momentum of the outer steps, sharded as the replica is."""

    def __init__(self, model: GPT, config: Config, runtime: Runtime) -> None:
        """All ranks make one, after the model has its initial weights."""
        ranks = ranks_per_replica("diloco", config, runtime)
        self.replica = runtime.rank // ranks
        self._replicas, self._config = runtime.world_size // ranks, config.parallel
        self._own = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._common = {name: own.clone() for name, own in self._own.items()}
        self._momentum = {name: torch.zeros_like(own) for name, own in self._own.items()}
        timeout = timedelta(seconds=config.health.collective_timeout)
        # The ranks that hold the same shard in each replica. Everybody has to make the groups of all.
        peers = [dist.new_group(range(shard, runtime.world_size, ranks), timeout) for shard in range(ranks)]
        self._peers: Any = peers[runtime.rank % ranks]  # of a type that differs between versions of torch

    @torch.no_grad()
    def step(self) -> None:
        """Take the outer step; afterwards all replicas have the same weights. All ranks call it."""
        own, common, momentum = ([_local(t) for t in ts.values()] for ts in (self._own, self._common, self._momentum))
        # One message, since what is slow between replicas is often slow to answer, too.
        way = torch.cat([(start - now).flatten() for start, now in zip(common, own, strict=True)])
        dist.all_reduce(way, group=self._peers)
        way /= self._replicas
        gradients = torch.split(way, [now.numel() for now in own])
        for now, start, velocity, flat in zip(own, common, momentum, gradients, strict=True):
            gradient = flat.view_as(start)
            velocity.mul_(self._config.outer_momentum).add_(gradient)
            start.sub_(gradient.add(velocity, alpha=self._config.outer_momentum), alpha=self._config.outer_lr)
            now.copy_(start)

    def start_from_here(self) -> None:
        """Take the weights of the model, which are the same in all replicas, for the common ones."""
        for name, own in self._own.items():
            self._common[name].copy_(own)
            self._momentum[name].zero_()

    def in_checkpoint(self, replica: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds, given the tensors of this replica. The model in it is the one that all share."""
        return {"model": self._common, "outer": self._momentum, "replica": {str(self.replica): replica}}


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
