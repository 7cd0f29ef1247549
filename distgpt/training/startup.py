"""What a run is about to do, in words, before its first step: its size, its length, and what looks like a mistake."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from distgpt.checkpoint.manifest import STATE, RunState
from distgpt.config import Config, from_dict, keys, value_at
from distgpt.corpus.shards import Dataset, open_dataset, verify_dataset
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError
from distgpt.model.optim import lr_at
from distgpt.suggestion import MANY_EPOCHS, steps_of_many_epochs

# What may differ from one attempt to the next without a word: where the run is, and what launchers take back.
PLACE_KEYS = ("run.dir", "run.fresh")
LARGE_JUMP = 2.0
# Bytes a second. One that is slower hangs.
SLOWEST_DISK = 1e6


def describe(
    config: Config, dataset: Dataset, model: nn.Module, runtime: Runtime, dtype: torch.dtype, micro_batch: int
) -> str:
    """The run in a few lines."""
    parameters = sum(p.numel() for p in model.parameters())
    accumulation = config.train.global_batch // (micro_batch * runtime.world_size)
    device = runtime.device.type
    threads = torch.get_num_threads()
    each = f"threads: {threads} each" if device == "cpu" else torch.cuda.get_device_name(runtime.device)
    return (
        f"data      {dataset.path}: {dataset.train.tokens:,} tokens, vocabulary {dataset.vocab_size:,}\n"
        f"model     {parameters:,} parameters, computes in {str(dtype).removeprefix('torch.')}\n"
        f"devices   {runtime.world_size} x {device} ({each})\n"
        f"batch     {config.train.global_batch} sequences of {config.model.block_size} tokens = "
        f"{runtime.world_size} ranks x {micro_batch} x {accumulation} accumulation steps\n"
        f"length    {config.train.steps:,} steps = {config.train.steps * tokens_per_step(config):,} tokens, "
        f"{_count(epochs(config, dataset.train.tokens))} epochs"
    )


def outlook(config: Config, dataset: Dataset, restored: RunState | None) -> tuple[str, list[str]]:
    """What to add where the run is said to go on, and a line for each thing that is hardly meant."""
    doubts = list(warnings(config, dataset.train.tokens))
    if restored is None:
        return "", doubts
    then = from_dict(restored.config, source=STATE)
    different = changes(then, config)
    jump = learning_rate_jump(then, config, restored.step)
    return f" with other values: {'; '.join(different)}" if different else "", doubts + ([jump] if jump else [])


def warnings(config: Config, train_tokens: int) -> Iterator[str]:
    """Lines about values that can work but are hardly meant."""
    steps, optim = config.train.steps, config.optim
    if epochs(config, train_tokens) > MANY_EPOCHS:
        enough = steps_of_many_epochs(train_tokens // config.model.block_size, config.train.global_batch)
        times = _count(epochs(config, train_tokens))
        yield (
            f"the run reads its {train_tokens:,} training tokens {times} times (epochs), "
            f"and little is learned after {MANY_EPOCHS}: --train.steps={enough} or more text will do"
        )
    if optim.warmup_steps >= steps:
        yield (
            f"optim.warmup_steps is {optim.warmup_steps:,} and the run has {steps:,} steps: the learning rate ends at "
            f"{lr_at(steps - 1, optim, steps):.2e} and never reaches optim.lr = {optim.lr:.2e}; warm up for fewer steps"
        )


def changes(then: Config, now: Config) -> list[str]:
    """Each key that differs when a run is resumed, with its old and its new value."""
    return [
        f"{key} {_shown(value_at(then, key))} -> {_shown(value_at(now, key))}"
        for key in keys()
        if key not in PLACE_KEYS and value_at(then, key) != value_at(now, key)
    ]


def learning_rate_jump(then: Config, now: Config, step: int) -> str | None:
    """A line where the learning rate leaps when a run is resumed after `step` with other values."""
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
        line + f"the {then.optim.schedule} schedule of {then.train.steps:,} steps had come down, and one of "
        f"{now.train.steps:,} has not; a run that may go further avoids that with a higher optim.min_lr, or with "
        "optim.schedule=wsd from a checkpoint before its decay"
    )


def tokens_per_step(config: Config) -> int:
    """Tokens of a global batch."""
    return config.train.global_batch * config.model.block_size


def epochs(config: Config, train_tokens: int) -> float:
    """How often the run reads its training text."""
    return config.train.steps * tokens_per_step(config) / train_tokens


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


def open_data_of_run(recorded: str, given: str | None, *, fingerprint: str | None) -> Dataset:
    """The data of a run, verified: where the run has it recorded, or `given` by a person. Raises DataError.

    `fingerprint`: that of the data that the run was trained on; None to take other data as well.
    """
    path = Path(given or recorded)
    if given is None and not path.is_dir():
        raise DataError(f"the run's data is not in {path} any more: say where it is with --data=DIR")
    dataset = open_dataset(path)
    verify_dataset(dataset)
    if fingerprint is not None and dataset.fingerprint != fingerprint:
        raise DataError(f"{path} is not the data that the run was trained on: say where that is with --data=DIR")
    return dataset
