"""The error of a plan: a run compares its step time, and on a GPU its memory, with what was planned for it."""

import torch

from distgpt.config import Config
from distgpt.distributed.plan import Plan, planned_memory
from distgpt.planning.devices import DEVICES, Device
from distgpt.planning.layouts import step_seconds
from distgpt.telemetry.console import step_time
from distgpt.telemetry.metrics import memory_bytes
from distgpt.telemetry.peaks import product_name
from distgpt.units import size_text

# On a CPU, a step of a narrower model is all overhead, and no share of the peak can be assumed.
NARROWEST = 128


def grade(config: Config, plan: Plan, seconds: float, *, vocab_size: int, peak: float | None) -> str | None:
    """Say how far the measured seconds of a step, and the memory of this rank, are from the plan.

    None for a model that is too narrow to plan for on a CPU. `peak`: FLOP/s of a device, None if unknown.
    """
    own = plan.runtime.device
    if own.type == "cpu" and config.model.n_embd < NARROWEST:
        return None
    device = known_device(own)
    if peak is None or device is None:
        parts = [f"step {step_time(seconds)}, not planned, since no peak or MFU is known for this device"]
    else:
        planned = step_seconds(config, plan, device, vocab_size=vocab_size, peak=peak, mfu=device.mfu)
        error = f"{seconds / planned - 1:+.0%}"
        parts = [f"step {step_time(seconds)}, planned {step_time(planned)} at an MFU of {device.mfu:.0%} ({error})"]
    if own.type == "cuda":
        size, expected = memory_bytes(own), planned_memory(config, plan, plan.micro_batch, vocab_size=vocab_size).total
        parts.append(f"memory {size_text(size)}, planned {size_text(expected)} ({size / expected - 1:+.0%})")
    return f"plan      {'; '.join(parts)}"


def known_device(device: torch.device) -> Device | None:
    """Return the named device that this one is; None if it is not among DEVICES."""
    if device.type == "cpu":
        return DEVICES["cpu"]
    product = product_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return next((known for known in DEVICES.values() if known.product == product), None)
