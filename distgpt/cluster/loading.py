"""Tensors back from a checkpoint, whatever their sharding then and now; no code that it might bring is run."""

import pickle
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from distgpt.cluster.diloco import OuterOptimizer
from distgpt.cluster.manifest import (
    STATE,
    TOKENIZER,
    RunState,
    all_broken,
    committed,
    damage,
    listed,
    one_line,
    read_state,
    sha256_of,
    step_of,
)
from distgpt.config import from_dict
from distgpt.corpus.shards import Dataset, open_dataset, verify_dataset
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.errors import DataError, StorageError
from distgpt.model.gpt import GPT

# One process saving or loading on its own is what we ask for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def load_for_inference(run: Path, device: torch.device) -> tuple[GPT, Tokenizer, RunState]:
    """The model of a run directory's newest good checkpoint, in eval mode, with its tokenizer. One process.

    Says on stderr in one line what it skipped and why. Raises DataError if there is no good checkpoint.
    """
    checkpoint, broken = newest_good(run / "checkpoints")
    if checkpoint is None and broken:
        raise DataError(f"{run} {all_broken(broken)}")
    if checkpoint is None:
        raise DataError(f"{run} holds no checkpoint: train one with python -m distgpt.train --run.dir={run}")
    if broken:
        print(f"distgpt: reading {checkpoint}; skipped {listed(broken)}", file=sys.stderr)
    state = read_state(checkpoint)
    config = from_dict(state.config, source=str(checkpoint / STATE))
    model = GPT(config.model, state.vocab_size, state.eot_id)
    read_tensors({"model": model.state_dict()}, checkpoint, None)
    if sha256_of(checkpoint / TOKENIZER) != state.tokenizer_sha256:
        raise DataError(f"{checkpoint / TOKENIZER} is not the one that the model was trained with")
    return model.to(device).eval(), load_tokenizer(checkpoint / TOKENIZER), state


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


def newest_good(directory: Path, *, before: int | None = None) -> tuple[Path | None, dict[str, str]]:
    """The newest whole checkpoint, of a step below `before` where that is given, and what is wrong with newer ones."""
    broken: dict[str, str] = {}
    for checkpoint in committed(directory):
        if before is not None and step_of(checkpoint) >= before:
            continue
        problems = damage(checkpoint)
        if not problems:
            return checkpoint, broken
        broken[checkpoint.name] = problems[0]
    return None, broken


def load_for_training(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None,
    outer: OuterOptimizer | None = None,
) -> None:
    """Fill a model and its optimizers, on all ranks of the group."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    tensors = training_tensors(model, optimizer)
    apart = read_state(checkpoint).replicas > 1
    read_tensors(outer.in_checkpoint(tensors) if outer and apart else tensors, checkpoint, group)
    set_model_state_dict(model, tensors["model"])
    set_optimizer_state_dict(model, optimizer, {**optim, **tensors["optim"]}, options=options)
    if outer and not apart:
        outer.start_from_here()


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer state by name. Hyper-parameters stay out: the config and the step give them."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    return {
        "model": get_model_state_dict(model),
        "optim": {name: value for name, value in optim.items() if name.startswith("state.")},
    }


def read_tensors(tensors: dict[str, Any], checkpoint: Path, group: dist.ProcessGroup | None) -> None:
    """Fill `tensors` in place, whatever their sharding now and then. Raises DataError, StorageError."""
    reader = _Reader(checkpoint)
    reader.read_metadata()  # here a DataError is one; dcp.load would wrap it in its own
    try:
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if not isinstance(cause, OSError):
            raise
        raise StorageError(f"{checkpoint} cannot be read: {one_line(cause)}") from None


class _MetadataUnpickler(pickle.Unpickler):
    """DCP's metadata is a pickle; this builds only the plain records that one needs and runs no foreign code."""

    ALLOWED = frozenset(
        {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
                *("MetadataIndex", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata"),
            )
        }
        | {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
        }
        | {("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")}
    )

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # where Python 3.13 pickles it from
        if (module, name) == ("builtins", "getattr"):
            return _member  # how Python 3.11 up to 3.11.3 pickles a member of an Enum
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    """The member of an Enum; getattr itself would give foreign code a hold."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"it asks for an attribute of {kind!r}")
    return kind[name]


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, ValueError, TypeError) as error:
            raise DataError(f"{path} is not a checkpoint index of ours: {one_line(error)}") from None
        if not isinstance(metadata, Metadata):
            raise DataError(f"{path} is not a checkpoint index of ours")
        return metadata
