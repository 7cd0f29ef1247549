"""Training commands: the one that suits a prepared text and this machine, and lines that fit. Imports no torch."""

import re
import shlex
from pathlib import Path

from distgpt.config import resolve
from distgpt.machine import available_gpus, default_ranks

# Each repetition of a text helps less, and after 10 of them little (Muennighoff et al. 2023, arXiv:2305.16264).
MANY_EPOCHS = 10
# With fewer steps a model learns nothing, even from a short text.
MIN_STEPS = 100
# On a GPU, the first preset is suggested for which there are enough training tokens: read MANY_EPOCHS times, 20 tokens
# per parameter.
MIN_TOKENS_ON_GPU = {"modern-125m": 250_000_000, "seed": 22_000_000, "quickstart": 0}
# Of what is printed for any terminal, in columns.
WIDTH = 80


def training_command(data: Path, *, train_tokens: int, max_window: int) -> str:
    """Return the command that trains on `data`: a preset, at most MANY_EPOCHS epochs, one rank for each device.

    `max_window`: the most tokens that a window can have in both splits. It must fit into a shard of each.
    """
    preset = "quickstart"
    if available_gpus():
        preset = next(name for name, least in MIN_TOKENS_ON_GPU.items() if train_tokens >= least)
    config = resolve([preset], {})
    flags = []
    if Path(config.data.path) != data:
        flags.append(f"--data.path={data}")
        if config.run.dir:
            flags.append(f"--run.dir={Path('runs', data.resolve().name)}")
    block_size, batch = config.model.block_size, config.train.global_batch
    if max_window <= block_size:
        block_size = 2 ** max(0, (max_window - 1).bit_length() - 1)
        flags.append(f"--model.block_size={block_size}")
    steps = max(MIN_STEPS, steps_of_many_epochs(train_tokens // block_size, batch))
    if steps < config.train.steps:
        flags.append(f"--train.steps={steps}")
    ranks = max(ranks for ranks in range(1, default_ranks() + 1) if batch % ranks == 0)
    return f"{launcher(ranks)} {shlex.join([preset, *flags])}"


def launcher(ranks: int) -> str:
    """Return the beginning of a training command on one machine."""
    return f"{'python' if ranks == 1 else f'torchrun --standalone --nproc_per_node={ranks}'} -m distgpt.train"


def wrapped_command(text: str, *, indent: int) -> str:
    """Break a command at its options, so that it can be copied: a line that goes on ends in a backslash."""
    lines = [""]
    for number, part in enumerate(re.split(r" (?='?--)", text)):
        if number and len(lines[-1]) + len(part) > WIDTH - len("  \\"):
            lines[-1] += " \\"
            lines.append(" " * indent + part)
        else:
            lines[-1] += f" {part}" if number else part
    return "\n".join(lines)


def steps_of_many_epochs(windows: int, global_batch: int) -> int:
    """Return the number of steps that read each window MANY_EPOCHS times."""
    return max(1, MANY_EPOCHS * windows // global_batch)
