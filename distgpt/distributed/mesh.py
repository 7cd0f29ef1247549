"""How ranks are grouped: the device mesh of a strategy, every mesh dimension named."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distgpt.config import Config
from distgpt.distributed.plan import ranks_per_replica
from distgpt.distributed.runtime import Runtime


def build_mesh(strategy: str, config: Config, runtime: Runtime) -> DeviceMesh:
    """What FSDP shards over. fsdp: ("shard",), all ranks; hsdp: ("replicate", "shard"); diloco: its own ("shard",).

    Neighbouring ranks are a shard group.
    """
    ranks, size, device = runtime.world_size, ranks_per_replica(strategy, config, runtime), runtime.device.type
    if strategy == "fsdp":
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if strategy == "diloco" else mesh
