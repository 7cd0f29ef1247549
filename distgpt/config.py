"""The configuration of a run: a tree of frozen dataclasses, and the parser that builds it from a command line.

Precedence: defaults < presets and TOML files, left to right < environment DISTGPT_SECTION__KEY < --section.key=value.
Imports no torch, so that --help and the error for a mistyped key appear at once.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from distgpt.errors import UsageError, did_you_mean, did_you_mean_path
from distgpt.files import user_path

# importlib.resources would find the folder of a clone, which is also named distgpt, from the directory above it.
PACKAGE = Path(__file__).parent
_PRESETS = PACKAGE / "presets"

ENVIRONMENT_PREFIX = "DISTGPT_"
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}

PATHS = ("run.dir", "data.path", "init.from")
_WEIGHTED_PATH = re.compile(r"(.+):(\d+\.?\d*|\.\d+)")  # an entry of a mix in data.path
POSITIVE = (
    *("model.n_layer", "model.n_head", "model.n_embd", "model.block_size", "model.vocab_multiple", "model.rope_theta"),
    *("optim.lr", "optim.eps", "train.steps", "train.global_batch", "parallel.outer_every", "parallel.outer_lr"),
    *("eval.sequences", "checkpoint.keep", "log.every"),
    *("health.timeout", "health.start_timeout", "health.eval_timeout", "health.checkpoint_timeout"),
)
NOT_NEGATIVE = (
    *("model.n_kv_head", "model.head_size", "model.norm_eps", "model.mlp_hidden", "model.loss_chunk", "optim.min_lr"),
    *("optim.warmup_steps", "optim.weight_decay", "optim.grad_clip", "train.micro_batch", "parallel.shard"),
    *("eval.every", "eval.sample_tokens", "checkpoint.every", "health.skip_z"),
    "health.check_every",
)
# Larger than any model or batch, and small enough to try all divisors quickly.
MAX_SIZE = 2**24
BOUNDED = (
    *("model.n_layer", "model.n_head", "model.n_kv_head", "model.head_size", "model.n_embd", "model.mlp_hidden"),
    *("model.block_size", "model.vocab_multiple", "train.global_batch", "train.micro_batch"),
)

# Names of keys and presets in other trainers, each with the one to suggest.
SUGGESTED_KEYS = {
    "optimizer": "optim.name",
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "optim.lr"),
    **dict.fromkeys(("min_learning_rate", "final_lr"), "optim.min_lr"),
    **dict.fromkeys(("warmup", "warmup_iters", "num_warmup_steps"), "optim.warmup_steps"),
    **dict.fromkeys(("lr_scheduler", "lr_schedule", "scheduler"), "optim.schedule"),
    **dict.fromkeys(("clip", "clip_grad", "max_grad_norm", "gradient_clip"), "optim.grad_clip"),
    **dict.fromkeys(("max_iters", "max_steps", "iters", "iterations", "num_steps", "epochs", "steps"), "train.steps"),
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
SUGGESTED_PRESETS = {
    **dict.fromkeys(("gpt2", "gpt2-small"), "gpt2-124m"),
    "gpt2-medium": "gpt2-350m",
    "gpt2-large": "gpt2-774m",
    "gpt2-xl": "gpt2-1558m",
    "tinyshakespeare": "shakespeare",
}


def option(default: Any, help: str, unit: str = "") -> Any:
    """Declare a config field with its default, its text in --help, and what its value is there, such as STEPS."""
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True)
class RunConfig:
    """The run directory and the seed."""

    dir: str = option("", "run directory; empty: runs/<name of the data directory>", "DIR")
    seed: int = option(1337, "seed of the weights, the data order and dropout")
    fresh: bool = option(False, "start a new run: fail if the run directory holds checkpoints")


@dataclass(frozen=True)
class DataConfig:
    """The tokens to train on."""

    path: str = option(
        "data/stdlib", "data directory, written by distgpt.prepare, or several by weight: data/a:0.7,data/b:0.3", "DIR"
    )


@dataclass(frozen=True)
class InitConfig:
    """The weights to start from."""

    from_: str = option(
        "",
        "weights that a new run starts from: a directory of safetensors, a run or RUN@STEP; empty: random ones",
        "DIR",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    n_layer: int = option(6, "number of transformer blocks")
    n_head: int = option(6, "attention heads per block")
    n_kv_head: int = option(0, "key and value heads, each shared by a group of attention heads (GQA); 0: n_head")
    n_embd: int = option(384, "width of the residual stream")
    head_size: int = option(0, "width of each attention head; 0: n_embd / n_head")
    block_size: int = option(256, "context length in tokens", "TOKENS")
    dropout: float = option(0.0, "dropout probability of attention weights and of both residual branches")
    position: Literal["learned", "rope"] = option("learned", "position encoding")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    norm: Literal["layernorm", "rmsnorm"] = option(
        "layernorm", "normalization before attention, the feed-forward network and the head"
    )
    norm_eps: float = option(0.0, "added to the variance in normalizations; 0: 1e-5 for layernorm, 1e-6 for rmsnorm")
    mlp: Literal["relu", "gelu", "relu2", "swiglu"] = option("relu", "activation of the feed-forward network")
    mlp_hidden: int = option(0, "width of the feed-forward network; 0: 4 n_embd (swiglu: 8/3 n_embd, rounded up to 64)")
    qkv_bias: bool = option(False, "use biases in the query, key and value projections")
    bias: bool = option(True, "use biases in the other projections and in LayerNorm")
    qk_norm: bool = option(False, "normalize the queries and keys of each head with RMSNorm")
    tied_head: bool = option(False, "use the token embedding as output projection (which then has no bias)")
    head_bias: bool = option(True, "use a bias in the output projection, unless it is tied")
    embedding_dropout: bool = option(False, "apply dropout to the embeddings as well, as GPT-2 does")
    init: Literal["normal", "scaled"] = option(
        "normal", "weights from N(0, 0.02); scaled: residual projections divided by sqrt(2 n_layer)"
    )
    vocab_multiple: int = option(1, "pad the vocabulary to a multiple of this number (64 is fast on GPUs)")
    document_mask: bool = option(False, "let tokens attend within their own document only")
    loss_chunk: int = option(
        0, "compute logits and loss for this many tokens at a time, saves memory; 0: all at once", "TOKENS"
    )

    @property
    def size_of_heads(self) -> int:
        """The width of each attention head."""
        return self.head_size or self.n_embd // self.n_head


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = option(
        "adamw", "AdamW, or Muon for the weights of attention and feed-forward networks and AdamW for the rest"
    )
    lr: float = option(3e-4, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the decay")
    warmup_steps: int = option(0, "steps of linear warm-up", "STEPS")
    schedule: Literal["constant", "cosine", "wsd"] = option(
        "constant", "after warm-up: constant, cosine decay to min_lr, or constant, then linear decay (wsd)"
    )
    decay_fraction: float = option(0.2, "share of all steps in which wsd decays")
    weight_decay: float = option(0.01, "weight decay, for matrices only")
    beta1: float = option(0.9, "AdamW: decay of the first moment")
    beta2: float = option(0.999, "AdamW: decay of the second moment")
    eps: float = option(1e-8, "AdamW: added to the denominator")
    grad_clip: float = option(0.0, "clip the global gradient norm to this value; 0: no clipping")


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, its batches, and how they are computed."""

    steps: int = option(5000, "number of optimizer steps", "STEPS")
    global_batch: int = option(64, "sequences per optimizer step, over all ranks", "SEQUENCES")
    micro_batch: int = option(
        0,
        "sequences per forward pass; 0: as before or, in a new run, the largest that divides the batch of a rank, "
        "has at most 4,096 tokens (GPU: 16,384) and fits in memory",
        "SEQUENCES",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = option(
        "auto", "NVIDIA GPUs, an Apple GPU (mps, one process) or CPUs; auto: the first of them that is here"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "compute precision, weights stay float32; auto: bfloat16 on NVIDIA GPUs and CPUs with instructions for it",
    )
    compile: bool | Literal["auto"] = option(
        "auto", "compile blocks, head and loss with torch.compile; auto: on GPUs, if there is a C compiler"
    )
    tf32: bool = option(False, "round the inputs of float32 products to TF32, about 3 digits, on GPUs: faster")
    deterministic: bool = option(
        False, "use deterministic kernels, for bit-exact resumes on GPUs (on CPUs they are exact anyway): slower"
    )


@dataclass(frozen=True)
class ParallelConfig:
    """The layout over several ranks."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "diloco"] = option(
        "auto",
        "replicate (ddp), shard (fsdp), shard in groups (hsdp), train independent groups (diloco)",
    )
    shard: int = option(0, "hsdp, diloco: ranks per group; 0: the ranks of one node", "RANKS")
    reshard: bool | Literal["auto"] = option(
        "auto", "fsdp, hsdp: free the weights of a block after its forward pass; auto: if all do not fit in memory"
    )
    reduce: Literal["auto", "step", "micro_batch"] = option(
        "auto", "fsdp, hsdp: how often gradients are exchanged; auto: once a step if they fit in memory whole"
    )
    reduction: Literal["default", "exact"] = option(
        "default",
        "exact: gradients are summed as integers, and the weights are the same to the bit on any number of ranks",
    )
    outer_every: int = option(50, "diloco: steps between outer steps, in which the groups synchronize", "STEPS")
    outer_lr: float = option(0.7, "diloco: learning rate of the outer step (SGD with Nesterov momentum)")
    outer_momentum: float = option(0.9, "diloco: momentum of the outer step")
    activation_checkpoint: bool = option(False, "recompute each block in the backward pass, saves memory")


@dataclass(frozen=True)
class EvalConfig:
    """Validation loss and samples."""

    every: int = option(500, "steps between evaluations; 0: only after the last step", "STEPS")
    sequences: int = option(
        512, "validation windows per evaluation, spread evenly over the validation split", "SEQUENCES"
    )
    sample_tokens: int = option(256, "length in tokens of the text sample at each evaluation; 0: none", "TOKENS")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int | Literal["auto"] = option(
        500,
        "steps between checkpoints; best evaluations and the end are saved too; "
        "0: only those; auto: by the time that a save takes and the failures so far",
        "STEPS",
    )
    keep: int = option(
        3, "number of newest checkpoints to keep, in addition to the one with the lowest validation loss"
    )
    async_save: bool = option(True, "write checkpoints in the background while training continues")


@dataclass(frozen=True)
class LogConfig:
    """Lines and figures of a run."""

    every: int = option(10, "steps between log lines in the console, metrics.jsonl and TensorBoard", "STEPS")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of some steps, for Perfetto."""

    steps: str = option("", "the first and the last step to trace on rank 0, as 10:13; empty: none", "FIRST:LAST")

    @property
    def range(self) -> range:
        """The steps to trace. Raises UsageError."""
        first, _, last = self.steps.partition(":")
        if not self.steps:
            return range(0)
        if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UsageError(f"profile.steps is {self.steps!r}: it must be FIRST:LAST, two steps, as 10:13")
        return range(int(first), int(last) + 1)


@dataclass(frozen=True)
class HealthConfig:
    """Hangs, and updates that would do harm."""

    timeout: float = option(600.0, "seconds without progress in a training step before all ranks are killed", "SECONDS")
    start_timeout: float = option(
        900.0, "the same for each phase of the start: joining, restoring, the first step", "SECONDS"
    )
    eval_timeout: float = option(600.0, "the same for each evaluation batch or report", "SECONDS")
    checkpoint_timeout: float = option(
        900.0, "the same for a checkpoint, including the rest of the previous one", "SECONDS"
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "if the loss or gradient norm is NaN or infinite: end the run, or skip the update, at most 10 in a row",
    )
    skip_z: float = option(
        0.0, "skip an update if loss or gradient norm is this many standard deviations above recent ones; 0: never"
    )

    check_every: int = option(
        0,
        "with exact reduction: steps between checks in which each rank also computes a micro-batch of the next rank; "
        "results that differ end the run; 0: never",
        "STEPS",
    )

    @property
    def collective_timeout(self) -> float:
        """Seconds until a collective fails. Longer than the watchdog's limits, since the watchdog names the cause."""
        return 60.0 + max(self.timeout, self.start_timeout, self.eval_timeout, self.checkpoint_timeout)


@dataclass(frozen=True)
class Config:
    """All sections of the configuration."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    init: InitConfig = InitConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def run_dir(self) -> Path:
        """run.dir or, if that is empty, runs/<name of the data directory>; of a mix, runs/a+b."""
        return Path(self.run.dir or Path("runs", data_name(self.data.path)))


def resolve(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    model_of: Callable[[Config], ModelConfig] | None = None,
) -> Config:
    """Build the Config from presets, files and flags in `arguments`, and from `environment`.

    `model_of` returns the model of the weights that init.from names, whose values take the place of the defaults.
    Raises UsageError, and what `model_of` raises.
    """
    config = _resolve(Config(), arguments, environment)
    if model_of is not None and config.init.from_:
        config = _resolve(Config(model=model_of(config)), arguments, environment)
    check(config)
    return config


def _resolve(config: Config, arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Set in `config` the values of the presets, files and flags in `arguments`, and of `environment`."""
    files, flags = split_arguments(arguments)
    for file in files:
        config = _with_values(config, _read_toml(file), source=file)
    for name, text in sorted(environment.items()):
        if key := _key_in_environment(name):
            config = _with_value(config, key, text, source=name)
    for key, text in flags:
        config = _with_value(config, key, text, source=f"--{key}")
    for key in PATHS:
        try:
            path = value_at(config, key)
            expanded = _change_paths(path, user_path) if key == "data.path" else user_path(path)
            config = _with_value(config, key, expanded, source=key)
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from None
    return config


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in _PRESETS.iterdir() if p.name.endswith(".toml"))


def keys() -> list[str]:
    """Return every `section.key`, in order."""
    return [f"{section.name}.{name}" for section in dataclasses.fields(Config) for name in fields_of(section.name)]


def fields_of(section: str) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a section by the names of their keys: the field of init.from is `from_`, as Python needs."""
    return {field.name.removesuffix("_"): field for field in dataclasses.fields(section_type(section))}


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the config as nested dicts of plain values."""
    return {
        section.name: {name: value_at(config, f"{section.name}.{name}") for name in fields_of(section.name)}
        for section in dataclasses.fields(Config)
    }


def from_dict(tree: Mapping[str, Any], *, source: str) -> Config:
    """Invert to_dict. Missing keys get their defaults. Raises UsageError that names `source`."""
    return _with_values(Config(), tree, source=source)


def to_toml(config: Config) -> str:
    """Return the complete config as TOML, from which the same config can be read."""
    return tomli_w.dumps(to_dict(config))


def check(config: Config) -> None:
    """Raise UsageError for values that cannot work with any number of ranks and any data."""
    model, optim = config.model, config.optim
    for key in POSITIVE:
        value = value_at(config, key)
        _require(value > 0, f"{key} is {value}: it must be positive")
    for key in NOT_NEGATIVE:
        value = value_at(config, key)
        _require(isinstance(value, str) or value >= 0, f"{key} is {value}: it must not be negative")
    for key in BOUNDED:
        value = value_at(config, key)
        _require(value <= MAX_SIZE, f"{key} is {value}: it must be at most {MAX_SIZE:,}")
    seed = config.run.seed
    _require(abs(seed) < 2**62, f"run.seed is {seed}: it must be between -2^62 and 2^62")
    if not model.head_size:
        _require_divisor(config, "model.n_head", of="model.n_embd")
    _require_divisor(config, "model.n_kv_head", of="model.n_head")
    _require_divisor(config, "train.micro_batch", of="train.global_batch")
    if model.position == "rope":
        size = model.size_of_heads
        _require(size % 2 == 0, f"rope needs an even head size, but it is {size}")
    for key in ("model.dropout", "optim.beta1", "optim.beta2", "parallel.outer_momentum"):
        value = value_at(config, key)
        _require(0.0 <= value < 1.0, f"{key} is {value}: it must be at least 0 and below 1")
    fraction = optim.decay_fraction
    _require(0.0 < fraction <= 1.0, f"optim.decay_fraction is {fraction}: it must be above 0 and at most 1")
    _require(optim.min_lr <= optim.lr, f"optim.min_lr is {optim.min_lr}: it must be at most optim.lr = {optim.lr}")
    traced = config.profile.range.stop - 1
    _require(traced <= config.train.steps, f"profile.steps ends at {traced}, but train.steps is {config.train.steps}")
    if config.health.check_every:
        exact = config.parallel.reduction == "exact"
        _require(exact, "health.check_every compares gradients to the bit: it needs --parallel.reduction=exact")
    if config.parallel.strategy == "diloco":
        # The groups share one model only after an outer step, and only that can be evaluated or kept at the end.
        for key in ("train.steps", "eval.every"):
            steps, every = value_at(config, key), config.parallel.outer_every
            multiples = [n for n in (steps // every * every, (steps // every + 1) * every) if n]
            _require(
                steps % every == 0,
                f"{key} is {steps}, which is not a multiple of parallel.outer_every = {every}: "
                f"take {_join_with_or(multiples)}",
            )


def require_divisible_batch(config: Config, ranks: int) -> None:
    """Raise UsageError, saying which values would divide, unless ranks x micro-batch divides the global batch."""
    global_batch, micro_batch = config.train.global_batch, config.train.micro_batch
    if global_batch % ranks:
        below, above = global_batch // ranks * ranks, (global_batch // ranks + 1) * ranks
        near = f"{below} or {above}" if below else str(above)
        raise UsageError(
            f"train.global_batch {global_batch} does not divide over {ranks} ranks: take a global_batch of {near}, "
            f"or {_nearest_divisors(global_batch, ranks)} ranks"
        )
    per_rank = global_batch // ranks
    if micro_batch and per_rank % micro_batch:
        raise UsageError(
            f"train.micro_batch {micro_batch} does not divide the {per_rank} sequences of each rank "
            f"(train.global_batch {global_batch} over {ranks} ranks): take {_nearest_divisors(per_rank, micro_batch)}"
        )


def with_absolute_paths(config: Config) -> Config:
    """Return the config with absolute data.path and init.from, so that a run finds both from any directory."""
    data = replace(config.data, path=_change_paths(config.data.path, os.path.abspath))
    init = replace(config.init, from_=config.init.from_ and os.path.abspath(config.init.from_))
    return replace(config, data=data, init=init)


def shares_of(data_path: str) -> list[tuple[str, float]]:
    """Return the directories that data.path names, each with its share of the sequences.

    PATH:WEIGHT,PATH:WEIGHT is a mix, anything else a single directory. Raises UsageError for a weight of 0.
    """
    entries = _weighted_paths(data_path)
    weights = [float(weight or 1) for _, weight in entries]
    for (path, weight), value in zip(entries, weights, strict=True):
        _require(0 < value < math.inf, f"data.path: the weight of {path} is {weight}: it must be above 0")
    return [(path, value / sum(weights)) for (path, _), value in zip(entries, weights, strict=True)]


def data_name(data_path: str) -> str:
    """Return the name of the data directory; of a mix, all names as a+b."""
    return "+".join(Path(path).resolve().name for path, _ in _weighted_paths(data_path))


def value_at(config: Config, key: str) -> Any:
    """Return the value of `section.key`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), fields_of(section)[name].name)


def _weighted_paths(data_path: str) -> list[tuple[str, str]]:
    """Return the paths and weights of a mix; a single path has the weight ""."""
    entries = [_WEIGHTED_PATH.fullmatch(entry) for entry in data_path.split(",")]
    mixed = [(entry[1], entry[2]) for entry in entries if entry]
    return mixed if len(entries) > 1 and len(mixed) == len(entries) else [(data_path, "")]


def _change_paths(data_path: str, change: Callable[[str], str]) -> str:
    """Return data.path with each of its paths changed."""
    return ",".join(change(path) + (weight and f":{weight}") for path, weight in _weighted_paths(data_path))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def _require_divisor(config: Config, key: str, *, of: str) -> None:
    value, total = value_at(config, key), value_at(config, of)
    if value and total % value:
        nearest = _nearest_divisors(total, value, most=4)
        raise UsageError(f"{key} is {value}, which does not divide {of} = {total}: take {nearest}")


def _nearest_divisors(total: int, value: int, *, most: int = 6) -> str:
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    return _join_with_or(sorted(sorted(divisors, key=lambda n: abs(n - value))[:most]))


def _join_with_or(values: Sequence[object]) -> str:
    return " or ".join(map(str, values))


def value_text(value: object) -> str:
    """Return the value of a key as a user writes it; "empty" for an empty text."""
    return str(value).lower() if isinstance(value, bool) else str(value) or "empty"


@functools.cache
def section_type(name: str) -> Any:
    """Return the dataclass of a section."""
    return get_type_hints(Config)[name]


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split into presets and files, and keys with their values: --key=value, --key value, or --key for a bool."""
    files, flags = [], []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if not argument.startswith("-"):
            files.append(argument)
            continue
        key, equals, text = argument.removeprefix("--").partition("=")
        kind = _type_of(key, source=argument)
        if not equals and bool in (kind, *get_args(kind)):
            text = left.pop(0) if left and left[0].lower() in (*TRUE, *FALSE) else "true"
        elif not equals:
            if not left or left[0].startswith("--"):
                raise UsageError(f"--{key} has no value: write --{key}=VALUE")
            text = left.pop(0)
        flags.append((key, text))
    return files, flags


def _key_in_environment(name: str) -> str | None:
    """Return the key that DISTGPT_SECTION__KEY sets, None for another variable. Raises UsageError for a single _."""
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
        near = [SUGGESTED_KEYS[rest]] if len(near) > 1 and rest in SUGGESTED_KEYS else near
    if near:
        variables = [ENVIRONMENT_PREFIX + known.replace(".", "__").upper() for known in near]
        raise UsageError(f"unknown variable {name}: did you mean {_join_with_or(variables)}?")
    return None


def _read_toml(argument: str) -> dict[str, Any]:
    if not argument:
        raise UsageError("an argument is empty: give a preset or a .toml file, or remove it")
    preset = _PRESETS / f"{argument}.toml"
    try:
        if argument in preset_names():
            return tomllib.loads(preset.read_text(encoding="utf-8"))
        if Path(argument).is_dir():
            raise UsageError(
                f"{argument} is a directory, not a preset: to train on its data, write --data.path={argument}"
            )
        if not argument.endswith(".toml"):
            near = _nearest_preset(argument)
            hint = f"did you mean {near}?" if near else f"the presets are {', '.join(preset_names())}"
            raise UsageError(f"unknown preset {argument}: {hint} (a config file must end in .toml)")
        return tomllib.loads(Path(user_path(argument)).read_text(encoding="utf-8"))
    except OSError as error:
        hint = did_you_mean_path(Path(user_path(argument)))
        raise UsageError(f"cannot read {argument}: {error.strerror}{hint}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read {argument}: {error}") from None


def _with_values(config: Config, tree: Mapping[str, Any], *, source: str) -> Config:
    for section, values in tree.items():
        if not isinstance(values, Mapping):
            raise UsageError(f"{source}: {section} must be a table of keys, like [model]")
        for name, value in values.items():
            config = _with_value(config, f"{section}.{name}", value, source=source)
    return config


def _with_value(config: Config, key: str, value: Any, *, source: str) -> Config:
    parsed = _parse(value, _type_of(key, source=source), key, source)
    section, name = key.split(".")
    changed = dataclasses.replace(getattr(config, section), **{fields_of(section)[name].name: parsed})
    return dataclasses.replace(config, **{section: changed})


def _type_of(key: str, *, source: str) -> Any:
    if key not in keys():
        near = _nearest_keys(key)
        hint = f"did you mean {_join_with_or(near)}?" if near else "--help lists every key"
        where = "" if source.lstrip("-").startswith(key) else f" (in {source})"
        raise UsageError(f"unknown key {key}{where}: {hint}")
    section, name = key.split(".")
    return get_type_hints(section_type(section))[fields_of(section)[name].name]


def _nearest_keys(key: str) -> list[str]:
    """Return the keys that may be meant: known from other trainers, of the same name in another section, or similar."""
    name = key.rpartition(".")[2].lower().replace("-", "_")
    if name in SUGGESTED_KEYS:
        return [SUGGESTED_KEYS[name]]
    names = {known: known.partition(".")[2] for known in keys()}
    if same := [known for known in names if names[known] == name]:
        return same
    if "." not in key and (similar := difflib.get_close_matches(name, names.values(), n=1, cutoff=0.7)):
        return [known for known in names if names[known] == similar[0]]
    return difflib.get_close_matches(key, names, n=1, cutoff=0.5)


def _nearest_preset(name: str) -> str | None:
    """Return the preset that may be meant: another name, the nearest size of the same family, or a similar name."""
    name = name.lower().replace("_", "-").replace("gpt-2", "gpt2")
    if name in SUGGESTED_PRESETS:
        return SUGGESTED_PRESETS[name]
    family = [preset for preset in preset_names() if preset.startswith(name.partition("-")[0]) and _millions(preset)]
    if family:
        asked = _millions(name)
        return min(family, key=lambda preset: abs(math.log(_millions(preset) / asked))) if asked else family[0]
    return next(iter(difflib.get_close_matches(name, preset_names(), n=1)), None)


def _millions(preset: str) -> float:
    """Return the millions of parameters that the end of a preset's name states, 0 if there are none."""
    size = re.search(r"-(\d+(?:\.\d+)?)([mb])$", preset)
    return float(size[1]) * (1000 if size[2] == "b" else 1) if size else 0.0


def _parse(value: Any, kind: Any, key: str, source: str) -> Any:
    """Convert `value`, from TOML or a command line, to the type `kind`. Raises UsageError."""
    if get_origin(kind) is Union:  # a number or a certain word
        number, words = get_args(kind)
        if value in get_args(words):
            return value
        try:
            return _parse(value, number, key, source)
        except UsageError as error:
            hint = did_you_mean(str(value), get_args(words))
            raise UsageError(f"{error} or {' or '.join(get_args(words))}{hint}") from None
    if get_origin(kind) is Literal:
        parsed = value if value in get_args(kind) else None
        expected = f"one of {', '.join(get_args(kind))}{did_you_mean(str(value), get_args(kind))}"
    else:
        parsed, expected = _convert(value, kind), TYPE_NAMES[kind]
    if parsed is None:
        where = "" if source.startswith("--") else f" (in {source})"
        raise UsageError(f"{key} is {value!r}{where}: it must be {expected}")
    return parsed


def _convert(value: Any, kind: type) -> Any:
    """Return `value` as bool, str, int or float, None if it cannot be converted."""
    if kind is bool or isinstance(value, bool):
        text = str(value).lower()
        valid = kind is bool and isinstance(value, bool | str) and text in (*TRUE, *FALSE)
        return text in TRUE if valid else None
    if kind is str:
        return value if isinstance(value, str) else None
    with suppress(TypeError, ValueError, OverflowError):
        if kind is int and not isinstance(value, float):
            with suppress(ValueError):
                return int(value)  # a float would round a large seed
        number = float(value)
        if math.isfinite(number) and (kind is float or number.is_integer()):
            return kind(number)
    return None
