"""Muon over several ranks: the same update to the bit for any sharding."""

import sys
from pathlib import Path

import torch

from tests import jobs

# Takes two steps with random gradients, and saves weights and momenta of each layout. Over four ranks, 6 rows are
# shards of 2, 2, 2 and 0, and 18 rows of 5, 5, 5 and 3.
UPDATE = """
import os, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from distgpt.config import ModelConfig, OptimConfig
from distgpt.model.gpt import GPT
from distgpt.model.optim import build_optimizer
from distgpt.training.step import apply_update

ranks = int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    dist.init_process_group("gloo")

def updated(mesh):
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=6, block_size=4), vocab_size=7)
    model.init_weights(0)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, OptimConfig(name="muon", lr=0.1, weight_decay=0.5), "cpu")
    draw = torch.Generator().manual_seed(1)
    for _ in range(2):
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=draw)
            if isinstance(p, DTensor):
                gradient = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = gradient
        apply_update(optimizer, torch.tensor(3.0), clip=1.0, skip=torch.tensor(0.0))
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    momenta = {f"momentum of {n}": optimizer.state[p]["momentum"] for n, p in matrices.items()}
    tensors = (matrices | momenta).items()
    return {n: t.full_tensor().detach() if isinstance(t, DTensor) else t.detach() for n, t in tensors}

meshes = {"whole": None}
if ranks > 1:
    meshes["fsdp"] = init_device_mesh("cpu", (4,))
    meshes["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
result = {name: updated(mesh) for name, mesh in meshes.items()}
if ranks == 1 or dist.get_rank() == 3:
    torch.save(result, sys.argv[1])
if ranks > 1:
    dist.destroy_process_group()
"""


@jobs.linux_only
def test_every_sharding_gives_the_same_update_to_the_bit(tmp_path: Path) -> None:
    script = tmp_path / "update.py"
    script.write_text(UPDATE)
    one = jobs.run([sys.executable, str(script), str(tmp_path / "one.pt")])
    assert one.code == 0, one
    four = jobs.run(jobs.torchrun_command(4, str(tmp_path / "four.pt"), script=script))
    assert four.code == 0, four
    expected = torch.load(tmp_path / "one.pt")["whole"]
    assert len(expected) == 8
    layouts = torch.load(tmp_path / "four.pt")
    assert layouts.keys() == {"whole", "fsdp", "hsdp"}
    for layout, tensors in layouts.items():
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), f"{layout}: {name}"
