"""The device mesh of each strategy: the groups of ranks, with every mesh dimension named."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distgpt.distributed.plan import Plan


def build_mesh(plan: Plan) -> DeviceMesh:
    """Build the mesh that FSDP shards over. All ranks call it. Neighboring ranks form a shard group.

    fsdp: ("shard",), all ranks; hsdp: ("replicate", "shard"); diloco: ("shard",), the ranks of this replica.
    """
    ranks, size, device = plan.runtime.world_size, plan.ranks_per_replica, plan.runtime.device.type
    if plan.strategy == "fsdp":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if plan.strategy == "diloco" else mesh
