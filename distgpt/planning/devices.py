"""Named devices: their memory and links, and the share of their peak speed that training is assumed to reach.

Imports no torch. Peaks are in telemetry/peaks.py. Memory is as CUDA reports it, rounded down. Links are line rates of
NVIDIA's data sheets, in one direction.
"""

from dataclasses import dataclass

from distgpt.errors import UsageError, did_you_mean

# NCCL reaches about this share of a link's line rate: https://github.com/NVIDIA/nccl-tests/issues/212.
LINK_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Device:
    """A kind of device in a usual node."""

    product: str  # as CUDA names it
    memory: float  # GiB; 0: this machine's
    per_node: int  # devices in a node
    link: float  # GB/s from a device to the others of its node
    network: float  # Gbit/s from a node to other nodes
    links_from: str  # the source of both
    mfu: float  # 0 to 1, without recomputing and waiting for others
    mfu_from: str


HOPPER = "nanochat 41-50%, torchtitan 33-39% on H100"
GEFORCE = "nanoGPT 29%, LLMQ 50% on RTX 4090"
DEVICES = {
    "h100": Device("H100 80GB HBM3", 79, 8, 450, 3200, "DGX H100", 0.40, HOPPER),
    "h200": Device("H200", 139, 8, 450, 3200, "DGX H200", 0.40, HOPPER),
    "b200": Device("B200", 178, 8, 900, 3200, "DGX B200", 0.40, "as on H100"),
    "a100": Device("A100-SXM4-80GB", 79, 8, 300, 1600, "DGX A100", 0.45, "llm.c 56%, nanoGPT 29%"),
    "a100-40gb": Device("A100-SXM4-40GB", 39, 8, 300, 1600, "DGX A100", 0.45, "llm.c 56%, nanoGPT 29%"),
    "l40s": Device("L40S", 44, 8, 32, 400, "PCIe 4.0; network assumed", 0.35, "no source"),
    "3090": Device("RTX 3090", 23.5, 1, 16, 10, "half of PCIe 4.0; network assumed", 0.40, GEFORCE),
    "4090": Device("RTX 4090", 23.5, 1, 16, 10, "half of PCIe 4.0; network assumed", 0.40, GEFORCE),
    "5090": Device("RTX 5090", 31, 1, 32, 10, "half of PCIe 5.0; network assumed", 0.40, GEFORCE),
    "cpu": Device("", 0, 1, 2, 10, "assumed", 0.40, "20-76% seen on two cores, least for narrow models"),
}


def device_named(name: str) -> Device:
    """Return the device with this name. Raises UsageError that names the nearest known one."""
    key = name.lower()
    if key not in DEVICES:
        raise UsageError(f"unknown device {name}{did_you_mean(key, DEVICES)} (known are {', '.join(DEVICES)})")
    return DEVICES[key]
