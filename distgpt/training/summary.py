"""Describe a run before its first step: its size, its length, and settings that look like mistakes."""

from collections.abc import Iterator

import torch
from torch import nn

from distgpt.checkpoint.manifest import STATE, RunState
from distgpt.config import Config, from_dict, keys, value_at, value_text
from distgpt.corpus.shards import Dataset, Part, Split
from distgpt.distributed.device import compute_dtype, device_name
from distgpt.distributed.plan import Plan
from distgpt.model.optim import lr_at
from distgpt.run.paths import RunPaths
from distgpt.suggestion import MANY_EPOCHS, steps_of_many_epochs
from distgpt.units import count_text, ranks_text
from distgpt.usage import wrapped

# Keys that may differ from one attempt to the next: the place of the run, and a flag that launchers clear on a restart.
PLACE_KEYS = ("run.dir", "run.fresh")
LARGE_JUMP = 2.0


def describe(config: Config, plan: Plan, dataset: Dataset, model: nn.Module) -> str:
    """Describe a run in a few lines."""
    parameters = sum(p.numel() for p in model.parameters())
    runtime, device = plan.runtime, plan.runtime.device.type
    compiled = f", {plan.compile_reason}" if plan.compile_reason else ""
    dtype: str = plan.dtype_name
    if config.train.dtype == "auto" and device != "mps":
        fast = "fast" if plan.dtype == torch.bfloat16 else "bfloat16 is slow"
        kept = plan.dtype != compute_dtype("auto", runtime.device)
        dtype += " (auto: as before)" if kept else f" (auto: {fast} on this {device.upper()})"
    read = [f"{count_text(epochs(config, part))} epochs" for part in dataset.train.parts]
    mix = zip(dataset.train.mix, read, strict=False)
    lines = (
        f"data      {dataset}: {dataset.train.tokens:,} tokens, vocabulary {dataset.vocab_size:,}",
        *(f"          {part.share:.1%} {part.name}: {part.tokens:,} tokens, {times}" for part, times in mix),
        f"model     {parameters:,} parameters, computes in {dtype}{compiled}",
        f"devices   {runtime.world_size} x {device} ({device_name(runtime.device)})",
        f"batch     {config.train.global_batch} sequences of {config.model.block_size} tokens = "
        f"{ranks_text(runtime.world_size)} x {plan.micro_batch} x {plan.accumulation} accumulation steps",
        f"length    {config.train.steps:,} steps = {config.train.steps * tokens_per_step(config):,} tokens"
        f"{'' if dataset.train.mix else f', {read[0]}'}",
        f"strategy  {plan.strategy}, {plan.reason}{'; gradients are summed exactly' if plan.exact else ''}",
    )
    return "\n".join(map(wrapped, lines))


def start_message(config: Config, restored: RunState | None) -> str:
    """Say whether the run starts or goes on, and with which changed values."""
    if restored is None:
        return f"starting in {config.run_dir}"
    different = changes(from_dict(restored.config, source=STATE), config)
    with_others = f" with other values: {'; '.join(different)}" if different else ""
    return f"going on from step {restored.step} in {config.run_dir}{with_others}"


def nothing_to_do_message(config: Config, step: int) -> str:
    """Say that a run has finished all its steps, and how to extend it."""
    raised = "" if config.optim.schedule == "constant" else ", which raises the learning rate again"
    return (
        f"nothing to do: {config.run_dir} is at step {step} of {config.train.steps}; "
        f"to train further, set a larger --train.steps{raised}"
    )


def done_message(paths: RunPaths, last: int) -> str:
    """Say that a run has taken its last step, and where its loss curve is."""
    return f"done: step {last} in {paths.root}" + (f", loss curve in {paths.plot}" if paths.plot.exists() else "")


def warnings(config: Config, train: Split, restored: RunState | None) -> Iterator[str]:
    """Yield a line for each value that can work but is probably a mistake."""
    steps, optim = config.train.steps, config.optim
    for part in train.parts:
        if round(epochs(config, part)) > MANY_EPOCHS:
            windows = round(part.tokens / part.share) // config.model.block_size
            enough = steps_of_many_epochs(windows, config.train.global_batch)
            of = f" of {part.name}" if part.name else ""
            yield (
                f"the run reads its {part.tokens:,} training tokens{of} {count_text(epochs(config, part))} times "
                f"(epochs), and little is learned after {MANY_EPOCHS}: use --train.steps={enough} or more text"
            )
    if optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps:,} and the run has {steps:,} steps: the learning rate ends at "
            f"{lr_at(steps - 1, optim, steps):.2e} and never reaches optim.lr = {optim.lr:.2e}; warm up for fewer steps"
        )
    if restored is not None:
        jump = learning_rate_jump(from_dict(restored.config, source=STATE), config, restored.step)
        yield from [jump] if jump else []


def changes(then: Config, now: Config) -> list[str]:
    """List the keys that differ when a run is resumed, with their old and new values."""
    return [
        f"{key} {value_text(value_at(then, key))} -> {value_text(value_at(now, key))}"
        for key in keys()
        if key not in PLACE_KEYS and value_at(then, key) != value_at(now, key)
    ]


def learning_rate_jump(then: Config, now: Config, step: int) -> str | None:
    """Return a line if the learning rate jumps when a run is resumed after `step` with other values."""
    before = lr_at(step - 1, then.optim, then.train.steps)
    after, planned = lr_at(step, now.optim, now.train.steps), lr_at(step, then.optim, then.train.steps)
    if after == planned or max(before, after) <= LARGE_JUMP * min(before, after):
        return None
    named = ("lr", "min_lr", "warmup_steps", "schedule", "decay_fraction")
    changed = [f"optim.{name}" for name in named if getattr(then.optim, name) != getattr(now.optim, name)]
    line = f"the learning rate jumps from {before:.2e} to {after:.2e} at step {step + 1}/{now.train.steps}: "
    if changed:
        return line + "to avoid that, keep " + ", ".join(f"{key}={value_at(then, key)}" for key in changed)
    return (
        line + f"the {then.optim.schedule} schedule of {then.train.steps:,} steps had lowered it, and one of "
        f"{now.train.steps:,} has not; to extend a run without a jump, use a higher optim.min_lr, or "
        "optim.schedule=wsd and a checkpoint before its decay"
    )


def tokens_per_step(config: Config) -> int:
    """Return the tokens of a global batch."""
    return config.train.global_batch * config.model.block_size


def epochs(config: Config, part: Part) -> float:
    """Return how many times the run reads the training text of a dataset."""
    return config.train.steps * tokens_per_step(config) * part.share / part.tokens
