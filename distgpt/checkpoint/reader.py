"""Read the tensors of a checkpoint into any sharding, without running code that its files may hold."""

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.futures import Future

from distgpt.checkpoint.choice import NEWEST, choose
from distgpt.checkpoint.index import read_index
from distgpt.checkpoint.manifest import INDEX, STATE, TOKENIZER, RunState, one_line, open_file, read_state, sha256_of
from distgpt.config import Config, from_dict
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.errors import DataError, StorageError
from distgpt.health.outliers import OutlierFilter
from distgpt.model.gpt import GPT, meta_model

# The largest size of a stored tensor besides its values, in bytes: of its record (a pickle), and in all.
MAX_RECORD_BYTES, MAX_OVERHEAD_BYTES = 2**12, 2**14
# The pickle operations that torch.save() needs for the record of one tensor. None of them reads the memo: with the
# memo, a short record could nest tuples that take years to hash.
_OPERATIONS = frozenset(
    (
        *("PROTO", "GLOBAL", "BINPUT", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "BINPERSID"),
        *("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE", "REDUCE", "STOP"),
    )
)
_GLOBALS = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch [A-Z][A-Za-z0-9]*Storage")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

# A single process may save and load without a process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def load_for_inference(run: Path, device: torch.device, choice: str = NEWEST) -> tuple[GPT, Tokenizer, RunState]:
    """Choose and verify a checkpoint, see choose(), and load its model, its tokenizer and its state.

    Raises UsageError, DataError or StorageError.
    """
    return load_model(choose(run, choice), device)


def load_model(checkpoint: Path, device: torch.device) -> tuple[GPT, Tokenizer, RunState]:
    """Load the whole model of a verified checkpoint, in eval mode, with its tokenizer and state.

    Raises DataError or StorageError.
    """
    state = read_state(checkpoint)
    config = from_dict(state.config, source=str(checkpoint / STATE))
    require_model(checkpoint, config, state.vocab_size)
    model = GPT(config.model, state.vocab_size, state.eot_id)
    read_tensors({"model": model.state_dict()}, checkpoint)
    return model.to(device).eval(), read_tokenizer(checkpoint, state), state


def read_tokenizer(checkpoint: Path, state: RunState) -> Tokenizer:
    """Load the tokenizer of a checkpoint. Raises DataError if it is not the one of its state."""
    if sha256_of(checkpoint / TOKENIZER) != state.tokenizer_sha256:
        raise DataError(f"{checkpoint / TOKENIZER} is not the one that the model was trained with")
    return load_tokenizer(checkpoint / TOKENIZER)


def require_model(checkpoint: Path, config: Config, vocab_size: int) -> None:
    """Raise DataError unless a checkpoint holds the model of a config. Allocates no memory for the model."""
    index = read_index(checkpoint)
    wrong = DataError(f"{checkpoint / STATE} has a config of another model than the one stored")
    if config.model.n_layer > len(index.state_dict_metadata):
        raise wrong
    try:
        model = meta_model(config.model, vocab_size)
    except (RuntimeError, TypeError, OverflowError):  # sizes that no tensor can have
        raise wrong from None
    require_tensors(index, {"model": model.state_dict()}, checkpoint / INDEX)


@dataclass(frozen=True)
class TrainingState:
    """The parts of a run that a checkpoint stores. `outer`: the outer optimizer of diloco."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    outliers: OutlierFilter
    outer: OuterOptimizer | None = None

    def tensors(self) -> dict[str, Any]:
        """Return the tensors of this rank by name, as a checkpoint stores them."""
        own = self._model_and_optimizer()
        return self.outer.checkpoint_tensors(own) if self.outer else own

    def load(self, checkpoint: Path) -> RunState:
        """Load a checkpoint; each rank reads its own share. Raises DataError or StorageError."""
        state, own = read_state(checkpoint), self._model_and_optimizer()
        from_replicas = self.outer if state.replicas > 1 else None
        read_tensors(from_replicas.checkpoint_tensors(own) if from_replicas else own, checkpoint)
        set_model_state_dict(self.model, own["model"])
        optim = {**self._optimizer_state(), **own["optim"]}
        set_optimizer_state_dict(self.model, self.optimizer, optim, options=FLAT)
        if self.outer and not from_replicas:
            self.outer.reset()
        self.outliers.restore(state.guard)
        return state

    def _model_and_optimizer(self) -> dict[str, Any]:
        """Return the tensors of the model and the optimizer, but no hyper-parameters: those come from the config."""
        moments = {name: value for name, value in self._optimizer_state().items() if name.startswith("state.")}
        return {"model": get_model_state_dict(self.model), "optim": moments}

    def _optimizer_state(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=FLAT)


def read_tensors(tensors: dict[str, Any], checkpoint: Path, *, whole: dict[str, Any] | None = None) -> None:
    """Fill `tensors` in place; the checkpoint may be sharded in another way. Raises DataError or StorageError.

    `whole`: what the checkpoint must hold, if `tensors` are only a part of it.
    """
    index = read_index(checkpoint)  # outside of dcp.load, which would wrap a DataError
    require_tensors(index, tensors if whole is None else whole, checkpoint / INDEX)
    try:
        reader = _CheckpointReader(checkpoint, index)
        dcp.load(tensors, storage_reader=reader, no_dist=True)  # else ranks exchange pickles
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, DataError | AssertionError | RuntimeError | ValueError | pickle.UnpicklingError):
            raise DataError(f"{checkpoint} cannot be read: {one_line(cause)[:200]}") from None
        if not isinstance(cause, OSError):
            raise
        raise StorageError(f"{checkpoint} cannot be read: {one_line(cause)}") from None


def require_tensors(index: Metadata, wanted: Mapping[str, Any], path: Path) -> None:
    """Raise DataError unless an index holds exactly the tensors of a nested dict, with their shapes and dtypes.

    It may also hold tensors of other parts of a run, such as its optimizer or another replica.
    """
    tensors = flattened(wanted)
    parts = {_part(name) for name in tensors}
    for name in sorted(tensors.keys() | index.state_dict_metadata.keys()):
        known, held = tensors.get(name), index.state_dict_metadata.get(name)
        if not isinstance(held, TensorStorageMetadata):
            raise DataError(f"{path} holds no {name}")
        if known is None:
            if _part(name) in parts or name.split(".")[0] not in ("model", "optim", "outer", "replica"):
                raise DataError(f"{path} holds {name[:100]}, which the model does not have")
            continue
        if (held.size, held.properties.dtype) != (known.shape, known.dtype):
            stored, own = _describe_tensor(held.size, held.properties.dtype), _describe_tensor(known.shape, known.dtype)
            raise DataError(f"{path} holds {name} as {stored}, and the model has {own}")


def flattened(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a nested dict under names such as model.head.weight."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _part(name: str) -> tuple[str, ...]:
    """Return the part of a run that a tensor belongs to: the model, its optimizer, or one replica."""
    first, *rest = name.split(".")
    return (first, *rest[: 1 if first == "replica" else 0])


def _describe_tensor(size: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(size)}"


class TensorReader(dcp.FileSystemReader):
    """Fills tensors for dcp.load(), given an index. Subclasses say where each part of a tensor comes from."""

    def __init__(self, directory: Path, index: Metadata) -> None:
        super().__init__(directory)
        self._index = index

    def read_part(self, stored: MetadataIndex, ranges: Sequence[range]) -> torch.Tensor:
        """Return a part of a stored tensor: a range of indices for each dim."""
        raise NotImplementedError

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for."""
        for item in plan.items:
            ranges = [range(at, at + n) for at, n in zip(item.storage_offsets, item.lengths, strict=True)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(self.read_part(item.storage_index, ranges))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class _CheckpointReader(TensorReader):
    """Reads only payloads that are plain tensors."""

    def __init__(self, checkpoint: Path, index: Metadata) -> None:
        super().__init__(checkpoint, index)
        self._chunks = {
            MetadataIndex(name, chunk.offsets): (chunk.sizes, tensor.properties.dtype.itemsize)
            for name, tensor in index.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
            for chunk in tensor.chunks
        }

    def read_part(self, stored: MetadataIndex, ranges: Sequence[range]) -> torch.Tensor:
        return self._read_chunk(stored)[tuple(slice(part.start, part.stop) for part in ranges)]

    def _read_chunk(self, index: MetadataIndex) -> torch.Tensor:
        """Read a stored tensor. Raises OSError, and DataError if it is not the one that the index describes."""
        place, (shape, item_size) = self._index.storage_data[index], self._chunks[index]
        size = shape.numel() * item_size
        if place.length > size + MAX_OVERHEAD_BYTES:
            raise DataError(f"{index.fqn} is stored in {place.length} bytes, and is a tensor of {size}")
        with open_file(Path(self.path) / place.relative_path) as file:
            file.seek(place.offset)
            stored = io.BytesIO(file.read(place.length))
        _require_tensor(stored, size, index.fqn)
        stored.seek(0)
        tensor = torch.load(stored, map_location="cpu", weights_only=True)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
            raise DataError(f"{index.fqn} is not stored as a tensor of shape {list(shape)}")
        return tensor


def _require_tensor(file: io.BytesIO, size: int, name: str) -> None:
    """Raise DataError unless torch.load() will read no more than a tensor of `size` bytes.

    With weights_only=True, torch.load() loads tensors only. But a crafted file could still unpack to a thousand times
    its size, or use operations that take any amount of memory and time.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(f"{name} is not stored as a tensor: {one_line(error)}") from None
    data = [member for member in members if "/data/" in member.filename]
    others = [member for member in members if member not in data]
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or len(data) != 1 or data[0].file_size != size or sum(m.file_size for m in others) > MAX_RECORD_BYTES:
        raise DataError(f"{name} is not stored as a tensor of {size} bytes")
    try:
        file.seek(0)
        # With the reader of torch.load(), which may find another record than Python's zipfile.
        _require_record(torch._C.PyTorchFileReader(file).get_record("data.pkl"), name)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{name} is not stored as a tensor: {one_line(error)[:200]}") from None


def _require_record(record: bytes, name: str) -> None:
    """Raise DataError unless a pickle builds nothing but one tensor, ValueError if it is not a pickle."""
    for operation, argument, _ in pickletools.genops(record):
        if operation.name not in _OPERATIONS:
            raise DataError(f"{name} is not stored as a tensor: its record holds {operation.name}")
        if operation.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            raise DataError(f"{name} is not stored as a tensor: its record asks for {argument}"[:300])
