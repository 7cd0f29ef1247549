"""The origin that a checkpoint states, and its link to the checkpoint before it."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import distgpt
from distgpt.checkpoint.manifest import Origin
from distgpt.config import Config, to_dict
from distgpt.corpus.shards import Dataset
from distgpt.distributed.plan import Plan
from distgpt.units import ranks_text


def origin_of(config: Config, plan: Plan, dataset: Dataset) -> Origin:
    """Return the origin that the checkpoints of this attempt state, without the one that each follows."""
    version = f"distgpt {distgpt.__version__}, torch {torch.__version__}"
    device, layout = device_of(plan), layout_of(plan)
    return Origin(None, config_sha256(to_dict(config)), dataset.fingerprint, code_sha256(), version, device, layout)


def config_sha256(config: dict[str, Any]) -> str:
    """Return the SHA-256 of a config, as train.json has it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


@functools.cache
def code_sha256() -> str:
    """Return the SHA-256 of the files of distgpt, which this process has imported: sources and presets, by name."""
    root, digest = Path(distgpt.__file__).parent, hashlib.sha256()
    for file in sorted((*root.rglob("*.py"), *root.rglob("*.toml"))):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def device_of(plan: Plan) -> str:
    """Return the kind of the device of a rank, on which the rounding of its products depends."""
    device = plan.runtime.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else "Apple GPU"


def layout_of(plan: Plan) -> str:
    """Return the layout of a run, on which the rounding of its sums depends."""
    ranks, threads = ranks_text(plan.runtime.world_size), torch.get_num_threads()
    return f"{plan.strategy} on {ranks}, {plan.ranks_per_replica} a replica, {threads} threads each"


def find_break(step: int, origin: Origin, manifests: Mapping[int, str]) -> str:
    """Say what is wrong with the link from the checkpoint of a step to the one before it; empty if nothing.

    `manifests`: the SHA-256 of the manifest of each checkpoint that is here, by step. The one before may be gone.
    """
    previous = origin.previous
    stated = f"step {step} states that it follows {f'step {previous.step}' if previous else 'no other'}"
    between = [s for s in manifests if (previous.step if previous else -1) < s < step]
    if between:
        return f"{stated}, but there is step {max(between)}"
    if previous is not None and previous.step >= step:
        return stated
    if previous is not None and manifests.get(previous.step, previous.sha256) != previous.sha256:
        return f"{stated}, but not this one: the SHA-256 of its manifest is another"
    return ""
