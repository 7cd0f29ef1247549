"""The whole run as one tree of frozen dataclasses, and how a command line becomes one.

Precedence: defaults < presets and TOML files, left to right < environment DISTGPT_SECTION__KEY < --section.key=value.
Imports no torch, so that --help and a mistyped key answer at once.
"""

import dataclasses
import difflib
import math
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from distgpt.errors import UsageError
from distgpt.files import user_path

# The code that runs. importlib.resources would take the folder of that name in the directory above a clone.
PACKAGE = Path(__file__).parent
_PRESETS = PACKAGE / "presets"

ENVIRONMENT_PREFIX = "DISTGPT_"
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")

PATHS = ("run.dir", "data.path")
POSITIVE = (
    *("model.n_layer", "model.n_head", "model.n_embd", "model.block_size", "model.vocab_multiple", "model.rope_theta"),
    *("optim.lr", "optim.eps", "train.steps", "train.global_batch", "parallel.outer_every", "parallel.outer_lr"),
    *("eval.sequences", "checkpoint.keep", "log.every"),
    *("health.timeout", "health.start_timeout", "health.eval_timeout", "health.checkpoint_timeout"),
)
NOT_NEGATIVE = (
    *("model.n_kv_head", "model.mlp_hidden", "model.loss_chunk", "optim.min_lr", "optim.warmup_steps"),
    *("optim.weight_decay", "optim.grad_clip", "train.micro_batch", "parallel.shard"),
    *("eval.every", "eval.sample_tokens", "checkpoint.every", "health.skip_z"),
)
# More than any model or batch has, and few enough to try all divisors.
LARGEST = 2**24
BOUNDED = (
    *("model.n_layer", "model.n_head", "model.n_kv_head", "model.n_embd", "model.mlp_hidden", "model.block_size"),
    *("model.vocab_multiple", "train.global_batch", "train.micro_batch"),
)

# What other trainers call a key or a preset.
OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "optim.lr"),
    **dict.fromkeys(("min_learning_rate", "final_lr"), "optim.min_lr"),
    **dict.fromkeys(("warmup", "warmup_iters", "num_warmup_steps"), "optim.warmup_steps"),
    **dict.fromkeys(("lr_scheduler", "lr_schedule", "scheduler"), "optim.schedule"),
    **dict.fromkeys(("clip", "clip_grad", "max_grad_norm", "gradient_clip"), "optim.grad_clip"),
    **dict.fromkeys(("max_iters", "max_steps", "iters", "iterations", "num_steps", "epochs"), "train.steps"),
    **dict.fromkeys(("batch_size", "global_batch_size", "total_batch_size"), "train.global_batch"),
    **dict.fromkeys(("micro_batch_size", "device_batch_size", "per_device_batch_size"), "train.micro_batch"),
    **dict.fromkeys(("precision", "amp"), "train.dtype"),
    **dict.fromkeys(("context_length", "context", "seq_len", "sequence_length", "max_seq_len"), "model.block_size"),
    **dict.fromkeys(("layers", "num_layers", "n_layers", "depth"), "model.n_layer"),
    **dict.fromkeys(("heads", "num_heads", "n_heads"), "model.n_head"),
    **dict.fromkeys(("d_model", "hidden_size", "dim", "width", "embed_dim"), "model.n_embd"),
    **dict.fromkeys(("out_dir", "output_dir", "run_dir", "output", "logdir"), "run.dir"),
    **dict.fromkeys(("data", "dataset", "data_dir", "data_path"), "data.path"),
    **dict.fromkeys(("eval_interval", "eval_every"), "eval.every"),
    **dict.fromkeys(("save_every", "save_interval", "save_steps"), "checkpoint.every"),
    **dict.fromkeys(("log_interval", "log_every", "logging_steps"), "log.every"),
}
OTHER_PRESETS = {
    **dict.fromkeys(("gpt2", "gpt2-small"), "gpt2-124m"),
    "gpt2-medium": "gpt2-350m",
    "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m",
    **dict.fromkeys(("shakespeare", "tinyshakespeare"), "seed"),
}


def option(default: Any, help: str) -> Any:
    """A config field with its default and the line that --help shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    dir: str = option("", "run directory; empty: runs/<data name>")
    seed: int = option(1337, "seed of the weights, the data order and dropout")
    fresh: bool = option(False, "refuse to resume: the run directory must hold no checkpoint")


@dataclass(frozen=True)
class DataConfig:
    path: str = option("data/stdlib", "directory written by distgpt.prepare")


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = option(6, "transformer blocks")
    n_head: int = option(6, "attention heads")
    n_kv_head: int = option(0, "key and value heads, shared by groups of heads (GQA); 0: n_head")
    n_embd: int = option(384, "width of the residual stream")
    block_size: int = option(256, "context length in tokens")
    dropout: float = option(0.0, "probability, on attention weights, both residual branches and the embedding of GPT-2")
    position: Literal["learned", "rope"] = option("learned", "position information")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalization before each branch and the head")
    mlp: Literal["relu", "gelu", "relu2", "swiglu"] = option("relu", "feed-forward nonlinearity")
    mlp_hidden: int = option(0, "feed-forward width; 0: 4 n_embd (swiglu: 8/3 n_embd, rounded up to 64)")
    qkv_bias: bool = option(False, "biases in the query, key and value projections")
    bias: bool = option(True, "biases in the other projections and in LayerNorm")
    qk_norm: bool = option(False, "RMS-normalize queries and keys per head")
    tied_head: bool = option(False, "output projection shares the token embedding (no bias then)")
    head_bias: bool = option(True, "bias in an untied output projection")
    embedding_dropout: bool = option(False, "dropout after the embeddings as well (GPT-2)")
    init: Literal["normal", "scaled"] = option("normal", "N(0, 0.02); scaled: residual projections / sqrt(2 n_layer)")
    vocab_multiple: int = option(1, "pad the vocabulary to a multiple of this many rows (64 suits GPUs)")
    document_mask: bool = option(False, "tokens do not attend across end-of-text")
    loss_chunk: int = option(0, "tokens per chunk of the output projection and loss, saves memory; 0: all at once")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the decay")
    warmup_steps: int = option(0, "steps of linear warm-up")
    schedule: Literal["constant", "cosine", "wsd"] = option(
        "constant", "after warm-up: constant, cosine to min_lr, or stable then linear decay (wsd)"
    )
    decay_fraction: float = option(0.2, "share of all steps that wsd decays over")
    weight_decay: float = option(0.01, "decoupled weight decay, on matrices only")
    beta1: float = option(0.9, "AdamW, decay of the first moment")
    beta2: float = option(0.999, "AdamW, decay of the second moment")
    eps: float = option(1e-8, "AdamW, added to the denominator")
    grad_clip: float = option(0.0, "largest global gradient norm; 0: no clipping")


@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(5000, "optimizer steps")
    global_batch: int = option(64, "sequences per optimizer step, over all ranks")
    micro_batch: int = option(
        0, "sequences per forward on one rank; 0: the largest that divides, to 4,096 tokens on a CPU, 16,384 on a GPU"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "compute precision, weights stay float32; auto: bfloat16 where the device is fast at it"
    )
    compile: bool = option(False, "torch.compile each block")


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "diloco"] = option(
        "auto",
        "replicate (ddp), shard (fsdp), shard in groups (hsdp), which learn apart (diloco)",
    )
    shard: int = option(0, "ranks per shard group for hsdp and diloco; 0: the ranks of one node")
    outer_every: int = option(50, "diloco: steps that each group takes by itself between outer steps")
    outer_lr: float = option(0.7, "diloco: learning rate of the outer step, SGD with Nesterov momentum")
    outer_momentum: float = option(0.9, "diloco: momentum of the outer step")
    activation_checkpoint: bool = option(False, "recompute each block in the backward pass, saves memory")


@dataclass(frozen=True)
class EvalConfig:
    every: int = option(500, "steps between evaluations; 0: only after the last step")
    sequences: int = option(512, "validation windows, spread evenly over the validation split")
    sample_tokens: int = option(256, "tokens of the text sample written at each evaluation; 0: none")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | Literal["auto"] = option(
        500,
        "steps between checkpoints, besides each best evaluation and the end; "
        "0: only those; auto: by their cost and failures",
    )
    keep: int = option(3, "newest checkpoints kept, besides that of the lowest validation loss")
    async_save: bool = option(True, "write in the background while training goes on")


@dataclass(frozen=True)
class LogConfig:
    every: int = option(10, "steps between training lines in the console, metrics.jsonl and TensorBoard")


@dataclass(frozen=True)
class HealthConfig:
    timeout: float = option(600.0, "seconds without progress after which the ranks are ended, all at once, in a step")
    start_timeout: float = option(900.0, "the same for each part of the start: joining, restoring, the first step")
    eval_timeout: float = option(600.0, "the same for a batch of an evaluation, and for what is shown of it")
    checkpoint_timeout: float = option(900.0, "the same for a checkpoint, with what is left of the last one")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "at a loss or gradient norm that is NaN or infinite: end the run, or skip the update, at most 10 in a row",
    )
    skip_z: float = option(
        0.0, "skip an update whose loss or gradient norm is this many standard deviations above the last ones; 0: never"
    )

    @property
    def collective_timeout(self) -> float:
        """Seconds until a collective fails: later than the watchdog, which can say who is to blame."""
        return 60.0 + max(self.timeout, self.start_timeout, self.eval_timeout, self.checkpoint_timeout)


@dataclass(frozen=True)
class Config:
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) if self.run.dir else Path("runs") / Path(self.data.path).resolve().name


def config_from_command_line(arguments: Sequence[str], *, prog: str, about: str) -> Config:
    """Resolve the command line of a command that takes a config.

    Prints and exits 0 for --help and --print-config. Raises UsageError for anything that cannot be a run.
    """
    if "--help" in arguments or "-h" in arguments:
        print(help_text(prog, about))
        sys.exit(0)
    print_only = "--print-config" in arguments
    config = resolve([a for a in arguments if a != "--print-config"], os.environ)
    if print_only:
        print(to_toml(config), end="")
        sys.exit(0)
    return config


def resolve(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The Config of these presets, files and flags over this environment. Raises UsageError."""
    config = Config()
    files, flags = _files_and_flags(arguments)
    for file in files:
        config = _updated(config, _read_toml(file), source=file)
    for name, text in sorted(environment.items()):
        if key := _key_in_environment(name):
            config = _with_value(config, key, text, source=name)
    for key, text in flags:
        config = _with_value(config, key, text, source=f"--{key}")
    for key in PATHS:
        try:
            config = _with_value(config, key, user_path(value_at(config, key)), source=key)
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None
    check(config)
    return config


def preset_names() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _PRESETS.iterdir() if p.name.endswith(".toml"))


def keys() -> list[str]:
    """Every `section.key`, in order."""
    return [f"{s.name}.{k.name}" for s in dataclasses.fields(Config) for k in dataclasses.fields(_section(s.name))]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The tree as nested dicts of plain values."""
    return dataclasses.asdict(config)


def from_dict(tree: Mapping[str, Any], *, source: str) -> Config:
    """The inverse of to_dict; keys that are left out keep their defaults. Raises UsageError naming `source`."""
    return _updated(Config(), tree, source=source)


def to_toml(config: Config) -> str:
    """The resolved config as TOML, complete: feeding it back gives the same config."""
    return tomli_w.dumps(to_dict(config))


def help_text(prog: str, about: str) -> str:
    """--help: usage and every key with its meaning and default."""
    lines = [
        about,
        "",
        f"usage: python -m {prog} [PRESET or file.toml ...] [--section.key=value ...] [--print-config]",
        f"       torchrun --nproc_per_node=8 -m {prog} ...",
        "",
        f"presets: {', '.join(preset_names())}",
        "environment: DISTGPT_SECTION__KEY=value sets a key too; flags win over it",
        "paths: ~ is expanded, variables are not",
    ]
    width = max(map(len, keys())) + 4
    for section in dataclasses.fields(Config):
        lines.append("")
        for key in dataclasses.fields(_section(section.name)):
            kind = get_type_hints(_section(section.name))[key.name]
            choices = f" [{'|'.join(get_args(kind))}]" if get_origin(kind) is Literal else ""
            name = f"--{section.name}.{key.name}"
            lines.append(f"  {name:<{width}}{key.metadata['help']}{choices} (default: {_shown(key.default)})")
    return "\n".join(lines)


def check(config: Config) -> None:
    """Raise UsageError for values that no number of ranks and no data could make work."""
    model, train, optim = config.model, config.train, config.optim
    for key in POSITIVE:
        _require(value_at(config, key) > 0, f"{key} is {value_at(config, key)}: it must be positive")
    for key in NOT_NEGATIVE:
        value = value_at(config, key)
        _require(isinstance(value, str) or value >= 0, f"{key} is {value}: it cannot be negative")
    for key in BOUNDED:
        _require(value_at(config, key) <= LARGEST, f"{key} is {value_at(config, key)}: it can be {LARGEST:,} at most")
    seed = config.run.seed
    _require(abs(seed) < 2**62, f"run.seed is {seed}: it must lie between -2^62 and 2^62")
    if model.n_embd % model.n_head:
        divisors = [h for h in range(1, model.n_embd + 1) if model.n_embd % h == 0]
        near = sorted(divisors, key=lambda h: abs(h - model.n_head))[:4]
        raise UsageError(
            f"model.n_head is {model.n_head}, which does not divide model.n_embd = {model.n_embd}: "
            f"take {_either(sorted(near))} heads"
        )
    if model.n_kv_head and model.n_head % model.n_kv_head:
        divisors = [h for h in range(1, model.n_head + 1) if model.n_head % h == 0]
        raise UsageError(
            f"model.n_kv_head is {model.n_kv_head}, which does not divide model.n_head = {model.n_head}: "
            f"take {_either(divisors)}"
        )
    if model.position == "rope":
        head_size = model.n_embd // model.n_head
        _require(head_size % 2 == 0, f"rope turns pairs of values, but n_embd / n_head = {head_size} is odd")
    _require(0.0 <= model.dropout < 1.0, f"model.dropout is {model.dropout}: it must be at least 0 and below 1")
    _require(0.0 < optim.decay_fraction <= 1.0, f"optim.decay_fraction is {optim.decay_fraction}: 0 < it <= 1")
    _require(optim.min_lr <= optim.lr, f"optim.min_lr is {optim.min_lr}, above optim.lr = {optim.lr}")
    for key in ("optim.beta1", "optim.beta2", "parallel.outer_momentum"):
        _require(0.0 <= value_at(config, key) < 1.0, f"{key} is {value_at(config, key)}: 0 <= it < 1")
    if config.parallel.strategy == "diloco":
        # Only then have the groups one model: what is evaluated, or handed on when all is done.
        for key in ("train.steps", "eval.every"):
            steps, every = value_at(config, key), config.parallel.outer_every
            multiples = [n for n in (steps // every * every, (steps // every + 1) * every) if n]
            _require(
                steps % every == 0,
                f"{key} is {steps}, which is no multiple of parallel.outer_every = {every}: take {_either(multiples)}",
            )
    if train.micro_batch and train.global_batch % train.micro_batch:
        divisors = [m for m in range(1, train.global_batch + 1) if train.global_batch % m == 0]
        near = sorted(divisors, key=lambda m: abs(m - train.micro_batch))[:4]
        raise UsageError(
            f"train.micro_batch is {train.micro_batch}, which does not divide train.global_batch = "
            f"{train.global_batch}: take {_either(sorted(near))}"
        )


def with_absolute_data(config: Config) -> Config:
    """The same with the whole path of the data, which a run keeps, so that it is found from any directory."""
    return replace(config, data=replace(config.data, path=os.path.abspath(config.data.path)))


def value_at(config: Config, key: str) -> Any:
    """The value of `section.key`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _either(values: Sequence[object]) -> str:
    return " or ".join(map(str, values))


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


def _section(name: str) -> Any:
    return get_type_hints(Config)[name]


def _files_and_flags(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Presets and files, and the keys with their values: --key=value, --key value, or --key where it is a switch."""
    files, flags = [], []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            files.append(argument)
            continue
        key, equals, text = argument.removeprefix("--").partition("=")
        kind = _type_of(key, source=argument)
        if not equals and kind is bool:
            text = left.pop(0) if left and left[0].lower() in (*TRUE, *FALSE) else "true"
        elif not equals:
            if not left or left[0].startswith("--"):
                raise UsageError(f"--{key} has no value: write --{key}=VALUE")
            text = left.pop(0)
        flags.append((key, text))
    return files, flags


def _key_in_environment(name: str) -> str | None:
    """The key that DISTGPT_SECTION__KEY sets, None for a variable that is no key. Raises UsageError for one _ alone."""
    if not name.startswith(ENVIRONMENT_PREFIX):
        return None
    rest = name.removeprefix(ENVIRONMENT_PREFIX).lower()
    if "__" in rest:
        return rest.replace("__", ".", 1)
    section, _, key = rest.partition("_")
    if key and section in (known.name for known in dataclasses.fields(Config)):
        near = [f"{section}.{key}"] if f"{section}.{key}" in keys() else _nearest_keys(f"{section}.{key}")
    else:
        near = [known for known in keys() if known.partition(".")[2] == rest]
    if near:
        variables = [ENVIRONMENT_PREFIX + known.replace(".", "__").upper() for known in near]
        raise UsageError(f"{name} sets no key: did you mean {_either(variables)}?")
    return None


def _read_toml(argument: str) -> dict[str, Any]:
    if not argument:
        raise UsageError("an argument is empty: name a preset or a .toml file, or leave it out")
    preset = _PRESETS / f"{argument}.toml"
    try:
        if argument in preset_names():
            return tomllib.loads(preset.read_text(encoding="utf-8"))
        if Path(argument).is_dir():
            raise UsageError(f"{argument} is a directory, no preset: for data write --data.path={argument}")
        if not argument.endswith(".toml"):
            near = _nearest_preset(argument)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(preset_names())}"
            raise UsageError(f"no preset is called {argument}: {hint} (a file's name ends in .toml)")
        return tomllib.loads(Path(user_path(argument)).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read {argument}: {error}") from None


def _updated(config: Config, tree: Mapping[str, Any], *, source: str) -> Config:
    for section, values in tree.items():
        if not isinstance(values, Mapping):
            raise UsageError(f"{source}: {section} must be a table of keys, like [model]")
        for name, value in values.items():
            config = _with_value(config, f"{section}.{name}", value, source=source)
    return config


def _with_value(config: Config, key: str, value: Any, *, source: str) -> Config:
    parsed = _parsed(value, _type_of(key, source=source), key, source)
    section, name = key.split(".")
    changed = dataclasses.replace(getattr(config, section), **{name: parsed})
    return dataclasses.replace(config, **{section: changed})


def _type_of(key: str, *, source: str) -> Any:
    if key not in keys():
        near = _nearest_keys(key)
        hint = f"did you mean {_either(near)}?" if near else "--help lists every key"
        where = "" if source.lstrip("-").startswith(key) else f" (in {source})"
        raise UsageError(f"unknown key {key}{where}: {hint}")
    section, name = key.split(".")
    return get_type_hints(_section(section))[name]


def _nearest_keys(key: str) -> list[str]:
    """The keys that may be meant: by another trainer's name for one, of that name in another section, or alike."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    if name in OTHER_NAMES:
        return [OTHER_NAMES[name]]
    names = {known: known.partition(".")[2] for known in keys()}
    if same := [known for known in names if names[known] == name]:
        return same
    if "." not in key and (alike := difflib.get_close_matches(name, names.values(), n=1, cutoff=0.7)):
        return [known for known in names if names[known] == alike[0]]
    return difflib.get_close_matches(key, names, n=1, cutoff=0.5)


def _nearest_preset(name: str) -> str | None:
    """The preset that may be meant: by the published name of its size, of the nearest size in its family, or alike."""
    name = name.lower().replace("_", "-").replace("gpt-2", "gpt2")
    if name in OTHER_PRESETS:
        return OTHER_PRESETS[name]
    family = [preset for preset in preset_names() if preset.startswith(name.partition("-")[0]) and _millions(preset)]
    if family:
        asked = _millions(name)
        return min(family, key=lambda preset: abs(math.log(_millions(preset) / asked))) if asked else family[0]
    return next(iter(difflib.get_close_matches(name, preset_names(), n=1)), None)


def _millions(preset: str) -> float:
    """The millions of parameters that the end of a preset's name states, 0 where it states none."""
    found = re.search(r"-(\d+(?:\.\d+)?)([mb])$", preset)
    return float(found[1]) * (1000 if found[2] == "b" else 1) if found else 0.0


def _parsed(value: Any, kind: Any, key: str, source: str) -> Any:
    """`value`, from TOML or text, as `kind`. Raises UsageError."""
    where = "" if source.startswith("--") else f" (in {source})"
    if get_origin(kind) is Union:  # a number, or a word that stands for one
        number, words = get_args(kind)
        if value in get_args(words):
            return value
        try:
            return _parsed(value, number, key, source)
        except UsageError as error:
            raise UsageError(f"{error} or {' or '.join(get_args(words))}") from None
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UsageError(f"{key} is {value!r}{where}: it must be one of {', '.join(get_args(kind))}")
    text = value if isinstance(value, str) else None
    if kind is bool:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in (*TRUE, *FALSE):
            return text.lower() in TRUE
        raise UsageError(f"{key} is {value!r}{where}: it must be true or false")
    if kind is str and text is not None:
        return text
    if kind in (int, float) and not isinstance(value, bool):
        with suppress(TypeError, ValueError):
            if kind is int and not isinstance(value, float):
                return int(value)  # a float would round a large seed
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and kind is float:
            return number
        if number.is_integer():
            return int(number)
    expected = {int: "a whole number", float: "a number", str: "a text"}[kind]
    raise UsageError(f"{key} is {value!r}{where}: it must be {expected}")
