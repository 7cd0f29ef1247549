"""The groups of ranks of each strategy: its device mesh, with every mesh dimension named, and replicas of a shard."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distgpt.distributed.plan import Plan


def build_mesh(plan: Plan) -> DeviceMesh:
    """Build the mesh that FSDP shards over. All ranks call it. Neighboring ranks form a shard group.

    fsdp: ("shard",), all ranks; hsdp: ("replicate", "shard"); diloco, or if gradients are summed exactly: ("shard",),
    the ranks of this replica.
    """
    ranks, size, device = plan.runtime.world_size, plan.ranks_per_replica, plan.runtime.device.type
    if plan.strategy == "fsdp":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if plan.strategy == "diloco" or plan.exact else mesh


def same_shard_group(plan: Plan, timeout: timedelta | None = None) -> Any:
    """Create the group of the ranks that hold the same shard, one of each replica. All ranks call it."""
    ranks, size = plan.ranks_per_replica, plan.runtime.world_size
    # Every rank has to create all groups. Their type differs between versions of torch.
    groups: list[Any] = [dist.new_group(range(shard, size, ranks), timeout) for shard in range(ranks)]
    return groups[plan.runtime.rank % ranks]
