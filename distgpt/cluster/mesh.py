"""The device mesh of a strategy, every mesh dimension named."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distgpt.errors import UsageError


def shard_group_size(*, shard: int, world_size: int, local_world_size: int) -> int:
    """Ranks per shard group for hsdp: parallel.shard, or the ranks of one node.

    Raises UsageError naming the sizes that divide the ranks.
    """
    size = shard or local_world_size
    if world_size % size:
        divisors = [s for s in range(1, world_size + 1) if world_size % s == 0]
        choices = " or ".join(map(str, divisors))
        raise UsageError(f"parallel.shard is {size}, which does not divide {world_size} ranks: take {choices}")
    return size


def build_mesh(strategy: str, *, device_type: str, world_size: int, shard: int) -> DeviceMesh:
    """fsdp: ("shard",) over all ranks; hsdp: ("replicate", "shard") with `shard` neighbouring ranks a group."""
    if strategy == "hsdp":
        return init_device_mesh(device_type, (world_size // shard, shard), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
