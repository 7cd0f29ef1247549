"""Check that the checkpoints of a run directory belong to the run that is about to start."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from distgpt.checkpoint.manifest import STATE, RunState, checkpoint_path, committed, read_state
from distgpt.config import Config, from_dict, keys, value_at
from distgpt.corpus.shards import Dataset
from distgpt.errors import DataError, UsageError
from distgpt.machine import available_gpus, cpu_has_one_of

# Keys outside of model.* that change the result.
FIXED_KEYS = ("run.seed", "optim.name", "train.global_batch")
# Keys of model.* that do not change the result.
FREE_KEYS = ("model.loss_chunk",)


def require_same_run(directory: Path, config: Config, dataset: Dataset, *, replicas: int) -> RunState | None:
    """Return the state of the newest checkpoint that can be read, None if there is none.

    Raises UsageError with a diff if it has another model, data, seed or global batch. The number of independent
    `replicas` must be equal too, since each has an optimizer of its own.
    """
    state = newest_state(directory)
    if state is None:
        return None
    differences = _differences(state, config, dataset)
    if state.replicas not in (1, replicas):
        differences.append(f"replicas of diloco {state.replicas} -> {replicas}")
    if differences:
        raise UsageError(
            f"{checkpoint_path(directory, state.step)} was made by another run: {'; '.join(differences)}; "
            "resume with the same values or choose another --run.dir"
        )
    return state


def newest_state(directory: Path) -> RunState | None:
    """Return the state of the newest checkpoint that can be read, None if there is none. restore() reports damage."""
    for checkpoint in committed(directory):
        with suppress(DataError):
            return read_state(checkpoint)
    return None


def as_trained(state: RunState) -> Config:
    """Return the config in a checkpoint, with the micro-batch and the data type that were in use."""
    return with_choices_of(state, from_dict(state.config, source=STATE))


def with_choices_of(state: RunState, config: Config, *, ranks: int = 1) -> Config:
    """Return `config` with the micro-batch and the data type of a checkpoint, where `config` leaves the choice.

    Rounding depends on both, and the dropout masks of GPUs and compiled code on the first. A micro-batch that does not
    divide over the ranks is chosen anew.
    """
    train = config.train
    if not train.micro_batch and train.global_batch % (ranks * (state.micro_batch or 1)) == 0:
        train = replace(train, micro_batch=state.micro_batch)
    if train.dtype == "auto":
        asked = from_dict(state.config, source=STATE).train.dtype
        train = replace(train, dtype=state.dtype or (unrecorded_dtype() if asked == "auto" else asked))
    return replace(config, train=train)


def unrecorded_dtype() -> Literal["auto", "float32"]:
    """Return what train.dtype=auto was in checkpoints that do not record it: on CPUs bfloat16 with AMX alone."""
    return "auto" if available_gpus() or cpu_has_one_of({"amx_bf16"}) else "float32"


def fixed_differences(saved: Config, config: Config) -> list[str]:
    """List the keys, with their values, that differ between two configs and change what is learned."""
    fixed = [key for key in keys() if key in FIXED_KEYS or (key.startswith("model.") and key not in FREE_KEYS)]
    values = {key: (value_at(saved, key), value_at(config, key)) for key in fixed}
    return [f"{key} {old} -> {new}" for key, (old, new) in values.items() if old != new]


def _differences(state: RunState, config: Config, dataset: Dataset) -> list[str]:
    saved_config = from_dict(state.config, source=STATE)
    differences = fixed_differences(saved_config, config)
    if state.vocab_size != dataset.vocab_size:
        differences.append(f"vocabulary {state.vocab_size} -> {dataset.vocab_size}")
    if state.data_fingerprint != dataset.fingerprint:
        then = f"{state.data_fingerprint[:12]} ({saved_config.data.path})"
        differences.append(f"data {then} -> {dataset.fingerprint[:12]} ({dataset})")
    return differences
