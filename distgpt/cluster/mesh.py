"""How ranks are grouped: the device mesh of a strategy, every mesh dimension named."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distgpt.cluster.runtime import Runtime
from distgpt.config import Config
from distgpt.errors import UsageError


def ranks_per_replica(strategy: str, config: Config, runtime: Runtime) -> int:
    """Ranks that hold a replica together. hsdp, diloco: parallel.shard, or the ranks of one node.

    Raises UsageError naming the sizes that divide the ranks.
    """
    ranks = runtime.world_size
    if strategy not in ("hsdp", "diloco"):
        return ranks if strategy == "fsdp" else 1
    size = config.parallel.shard or runtime.local_world_size
    if ranks % size:
        divisors = " or ".join(str(s) for s in range(1, ranks + 1) if ranks % s == 0)
        raise UsageError(f"parallel.shard is {size}, which does not divide {ranks} ranks: take {divisors}")
    return size


def replicas_apart(config: Config, runtime: Runtime) -> int:
    """Replicas that learn apart from each other: those of diloco, one under any other strategy.

    Raises UsageError if diloco had only one.
    """
    if config.parallel.strategy != "diloco":
        return 1
    ranks, size = runtime.world_size, ranks_per_replica("diloco", config, runtime)
    if size == ranks:
        fix = "take parallel.shard=1" if ranks > 1 else "start it under torchrun on several devices"
        raise UsageError(f"diloco needs two replicas or more, and the number of ranks is {ranks}, all in one: {fix}")
    return ranks // size


def build_mesh(strategy: str, config: Config, runtime: Runtime) -> DeviceMesh:
    """What FSDP shards over. fsdp: ("shard",), all ranks; hsdp: ("replicate", "shard"); diloco: its own ("shard",).

    Neighbouring ranks are a shard group.
    """
    ranks, size, device = runtime.world_size, ranks_per_replica(strategy, config, runtime), runtime.device.type
    if strategy == "fsdp":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if strategy == "diloco" else mesh
