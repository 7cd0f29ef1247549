"""All figures of a run before it starts, with its best layout and command.

For a budget: Hoffmann et al. 2022, arXiv:2203.15556 (Chinchilla). Training N parameters on D tokens takes C = 6 N D
FLOPs, and the loss for a given C is lowest at about 20 tokens a parameter: N = sqrt(C / 120).
"""

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from distgpt.config import Config, DataConfig, preset_names, require_divisible_batch, resolve
from distgpt.corpus.shards import open_dataset
from distgpt.distributed.memory import USABLE_SHARE, checkpoint_bytes
from distgpt.errors import UsageError
from distgpt.model.gpt import count_parameters, meta_model
from distgpt.planning.devices import DEVICES
from distgpt.planning.layouts import GIB, Cluster, Layout, best_layout, layouts
from distgpt.suggestion import launcher

HOUR = 3600.0
TOKENS_PER_PARAMETER = 20
# The vocabulary if no data is named: that of the text that a preset is for, else GPT-2's.
VOCABULARIES = {"seed": 65, "shakespeare": 65, "quickstart": 223}
GPT2_VOCABULARY = 50_257
MAX_RANKS = 2**14
LOSS_CHUNK = 1024


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal size for a budget."""

    flops: float
    parameters: float
    tokens: float
    preset: str  # whose size is nearest


@dataclass(frozen=True)
class Forecast:
    """The figures of a run."""

    parameters: int
    vocab_size: int
    flops_per_token: float
    tokens_per_step: int
    steps: int
    tokens: int
    checkpoint_bytes: int
    cluster: Cluster
    layouts: list[Layout]
    best: Layout | None  # None: nothing fits
    optimum: Optimum | None  # for a budget
    seconds: float | None
    gpu_hours: float | None
    cost: float | None
    command: str | None


def forecast(
    config: Config,
    cluster: Cluster,
    arguments: Sequence[str],
    *,
    tokens: float | None = None,
    budget: float | None = None,
    price: float | None = None,
) -> Forecast:
    """Plan a run of `tokens`, of `budget` GPU-hours or, if both are None, of the steps in the config.

    `arguments`: the presets, files and flags of the config, for the command. `price`: of a GPU-hour. Raises UsageError
    if the batch does not divide over the ranks, or if the budget is less than a step takes.
    """
    require_divisible_batch(config, cluster.ranks)
    vocab_size = vocabulary(config, arguments)
    parameters = count_parameters(config.model, vocab_size)
    candidates = layouts(config, cluster, vocab_size=vocab_size)
    best = best_layout(config, candidates)
    per_step = config.train.global_batch * config.model.block_size
    steps = config.train.steps if tokens is None else math.ceil(tokens / per_step)
    if budget is not None and best is not None:
        steps = int(budget * HOUR / (cluster.ranks * best.step_seconds))
        if not steps:
            raise UsageError(f"--budget of {budget:g} GPU-hours is less than one step takes: raise it")
    seconds = None if best is None else steps * best.step_seconds
    gpu_hours = None if seconds is None else seconds * cluster.ranks / HOUR
    replicas = cluster.ranks // best.ranks_per_replica if best and best.strategy == "diloco" else 1
    return Forecast(
        parameters=parameters,
        vocab_size=vocab_size,
        flops_per_token=meta_model(config.model, vocab_size).flops_per_token(),
        tokens_per_step=per_step,
        steps=steps,
        tokens=steps * per_step,
        checkpoint_bytes=checkpoint_bytes(config, vocab_size, replicas),
        cluster=cluster,
        layouts=candidates,
        best=best,
        optimum=None if budget is None else optimum(budget, cluster),
        seconds=seconds,
        gpu_hours=gpu_hours,
        cost=None if gpu_hours is None or price is None else gpu_hours * price,
        command=None if best is None else command(config, cluster, best, arguments, steps=steps),
    )


def vocabulary(config: Config, arguments: Sequence[str]) -> int:
    """Return the vocabulary of the data that the config names; if there is none yet, that of the preset."""
    if config.data.path != DataConfig().path and Path(config.data.path).is_dir():
        return open_dataset(Path(config.data.path)).vocab_size
    return next((VOCABULARIES[word] for word in arguments if word in VOCABULARIES), GPT2_VOCABULARY)


def optimum(budget: float, cluster: Cluster) -> Optimum:
    """Return the compute-optimal size for `budget` GPU-hours at the assumed MFU."""
    flops = budget * HOUR * cluster.peak * cluster.mfu
    parameters = math.sqrt(flops / (6 * TOKENS_PER_PARAMETER))

    def distance(preset: str) -> float:
        size = count_parameters(resolve([preset], {}).model, VOCABULARIES.get(preset, GPT2_VOCABULARY))
        return abs(math.log(size / parameters))

    return Optimum(flops, parameters, TOKENS_PER_PARAMETER * parameters, min(preset_names(), key=distance))


def command(config: Config, cluster: Cluster, best: Layout, arguments: Sequence[str], *, steps: int) -> str:
    """Return the command that trains in this layout: a Slurm job for several nodes, else a command for one machine."""
    chosen: dict[str, object] = {} if best.strategy == "single" else {"parallel.strategy": best.strategy}
    chosen["train.micro_batch"] = best.micro_batch
    if best.activation_checkpoint != config.parallel.activation_checkpoint:
        chosen["parallel.activation_checkpoint"] = str(best.activation_checkpoint).lower()
    if steps != config.train.steps:
        chosen["train.steps"] = steps
    words = [*_without(arguments, chosen), *(f"--{key}={value}" for key, value in chosen.items())]
    if cluster.nodes == 1:
        return f"{launcher(cluster.ranks)} {shlex.join(words)}"
    gpus, ranks = f"--gpus-per-node={cluster.per_node} ", ""
    if cluster.name == "cpu":
        gpus, ranks = "", f"NPROC_PER_NODE={cluster.per_node} "
    return f"{ranks}sbatch --nodes={cluster.nodes} {gpus}slurm/train.sh {shlex.join(words)}"


def _without(arguments: Sequence[str], chosen: dict[str, object]) -> list[str]:
    """Return the arguments without the flags that set the chosen keys, whose values are replaced."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        key, equals, _ = word.removeprefix("--").partition("=")
        value_follows = skip and not word.startswith("--")
        skip = word.startswith("--") and key in chosen and not equals
        if not value_follows and not (word.startswith("--") and key in chosen):
            kept.append(word)
    return kept


def explain_no_fit(config: Config, plan: Forecast) -> str:
    """Say in one line that nothing fits, and what would."""
    cluster, least = plan.cluster, min(layout.memory.total for layout in plan.layouts)
    fixes = []
    if config.parallel.strategy != "auto":
        best = _best(replace(config, parallel=replace(config.parallel, strategy="auto")), cluster, plan.vocab_size)
        fixes += [f"with --parallel.strategy={best.strategy}"] if best else []
    if not config.model.loss_chunk:
        chunked = replace(config, model=replace(config.model, loss_chunk=LOSS_CHUNK))
        fixes += [f"with --model.loss_chunk={LOSS_CHUNK}"] if _best(chunked, cluster, plan.vocab_size) else []
    for ranks in (2**power for power in range(cluster.ranks.bit_length(), MAX_RANKS.bit_length())):
        if best := _best(config, cluster.resized(ranks), plan.vocab_size):
            fixes.append(f"on {ranks} x {cluster.name} ({best.strategy})")
            break
    for name, device in sorted(DEVICES.items(), key=lambda item: item[1].memory):
        other = replace(cluster, name=name, device=device, memory=device.memory * GIB)
        if device.memory * GIB > cluster.memory and _best(config, other, plan.vocab_size):
            fixes.append(f"on {cluster.ranks} x {name}")
            break
    models = {name: resolve([name], {}).model for name in preset_names()}
    sizes = {name: count_parameters(model, plan.vocab_size) for name, model in models.items()}
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        if sizes[name] < plan.parameters and _best(replace(config, model=models[name]), cluster, plan.vocab_size):
            fixes.append(f"as a smaller model, {name}")
            break
    return (
        f"nothing fits: a rank needs at least {least / GIB:.1f} GiB, and training may take "
        f"{USABLE_SHARE * cluster.memory / GIB:.1f} of the {cluster.memory / GIB:.1f} GiB of a {cluster.name}; "
        f"it would fit {', or '.join(fixes) or 'on no device known here'}"
    )


def _best(config: Config, cluster: Cluster, vocab_size: int) -> Layout | None:
    """Return the best layout; None if nothing fits, or if the batch does not divide over the ranks."""
    with suppress(UsageError):
        return best_layout(config, layouts(config, cluster, vocab_size=vocab_size))
    return None
