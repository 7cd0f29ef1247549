"""Read the tensors of a checkpoint into any sharding, without running code that its files may hold."""

import errno
import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from dataclasses import replace
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
from distgpt.checkpoint.index import read_index, require_tensors
from distgpt.checkpoint.manifest import INDEX, STATE, TOKENIZER, RunState, one_line, open_file, read_state, sha256_of
from distgpt.config import Config, from_dict
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.errors import DataError, StorageError
from distgpt.model.gpt import GPT

# The most bytes of a stored tensor besides its values: in its record, and in all.
LARGEST_HEADER, LARGEST_EXTRA = 2**12, 2**14
# All operations that torch.save() needs for the record of one tensor. None reads the memo: a short record that repeats
# tuples from it would take years to hash.
_OPERATIONS = frozenset(
    (
        *("PROTO", "GLOBAL", "BINPUT", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "BINPERSID"),
        *("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "NEWTRUE", "NEWFALSE", "REDUCE", "STOP"),
    )
)
_GLOBALS = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch [A-Z][A-Za-z0-9]*Storage")

# It is intended that one process saves and loads alone.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def load_for_inference(run: Path, device: torch.device, choice: str = NEWEST) -> tuple[GPT, Tokenizer, RunState]:
    """Load the model of a checkpoint, see choose(), in eval mode, with its tokenizer and state, in one process.

    Raises UsageError, DataError or StorageError.
    """
    checkpoint = choose(run, choice)
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
    """Raise DataError unless a checkpoint holds the model of a config, before anything is allocated for one."""
    index = read_index(checkpoint)
    wrong = DataError(f"{checkpoint / STATE} has a config of another model than the one stored")
    if config.model.n_layer > len(index.state_dict_metadata):
        raise wrong
    try:
        with torch.device("meta"):
            model = GPT(replace(config.model, document_mask=False), vocab_size)
    except (RuntimeError, TypeError, OverflowError):  # sizes that no tensor can have
        raise wrong from None
    require_tensors(index, {"model": model.state_dict()}, checkpoint / INDEX)


def load_for_training(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    outer: OuterOptimizer | None = None,
) -> None:
    """Load a checkpoint into a model and its optimizers; each rank reads its own share.

    Raises DataError or StorageError.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    tensors = training_tensors(model, optimizer)
    has_replicas = read_state(checkpoint).replicas > 1
    read_tensors(outer.checkpoint_tensors(tensors) if outer and has_replicas else tensors, checkpoint)
    set_model_state_dict(model, tensors["model"])
    set_optimizer_state_dict(model, optimizer, {**optim, **tensors["optim"]}, options=options)
    if outer and not has_replicas:
        outer.reset()


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return model and optimizer state by name, without hyper-parameters, which the config and the step give."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    optim = get_optimizer_state_dict(model, optimizer, options=options)
    return {
        "model": get_model_state_dict(model),
        "optim": {name: value for name, value in optim.items() if name.startswith("state.")},
    }


def read_tensors(tensors: dict[str, Any], checkpoint: Path, *, whole: dict[str, Any] | None = None) -> None:
    """Fill `tensors` in place; the checkpoint may be sharded in another way. Raises DataError or StorageError.

    `whole`: what the checkpoint must hold, if `tensors` are only a part of it.
    """
    index = read_index(checkpoint)  # outside of dcp.load, which would wrap a DataError
    require_tensors(index, tensors if whole is None else whole, checkpoint / INDEX)
    reader = _Reader(checkpoint, index)
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=True)  # else ranks exchange pickles
    except dcp.CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, DataError | AssertionError | RuntimeError | ValueError | pickle.UnpicklingError):
            raise DataError(f"{checkpoint} cannot be read: {one_line(cause)[:200]}") from None
        if not isinstance(cause, OSError):
            raise
        raise StorageError(f"{checkpoint} cannot be read: {one_line(cause)}") from None


class _Reader(dcp.FileSystemReader):
    """Takes an index that is already read, and reads only payloads that are plain tensors."""

    def __init__(self, checkpoint: Path, index: Metadata) -> None:
        super().__init__(checkpoint)
        self._index = index
        self._sizes = {
            MetadataIndex(name, chunk.offsets): chunk.sizes.numel() * tensor.properties.dtype.itemsize
            for name, tensor in index.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
            for chunk in tensor.chunks
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self._index.storage_data[item.storage_index]
            with open_file(Path(self.path) / place.relative_path) as file:
                stored = _Slice(file, place.offset, place.length)
                _require_tensor(stored, self._sizes[item.storage_index], item.storage_index.fqn)
        return super().read_data(plan, planner)


class _Slice(io.RawIOBase):
    """A part of a file, read as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self.length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence] + offset
        if self._at < 0:
            raise OSError(errno.EINVAL, "negative position")
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(len(buffer), self.length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _require_tensor(stored: _Slice, size: int, name: str) -> None:
    """Raise DataError unless torch.load() will read no more than a tensor of `size` bytes.

    It loads tensors only, but may unpack a thousand times as much, or run operations that take any memory and time.
    """
    if stored.length > size + LARGEST_EXTRA:
        raise DataError(f"{name} is stored in {stored.length} bytes, and is a tensor of {size}")
    file = io.BufferedReader(stored)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(f"{name} is not stored as a tensor: {one_line(error)}") from None
    data = [member for member in members if "/data/" in member.filename]
    others = [member for member in members if member not in data]
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or len(data) != 1 or data[0].file_size != size or sum(m.file_size for m in others) > LARGEST_HEADER:
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
