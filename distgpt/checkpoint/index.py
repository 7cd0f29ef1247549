"""The index of a checkpoint, DCP's .metadata, read as data: tensors, their chunks, and the place of each in a file.

DCP writes it as a pickle, which is never unpickled here. A small reader knows the few operations that such an index
needs. It builds plain values and imports nothing. The values are then checked field by field.
"""

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from distgpt.checkpoint.manifest import INDEX, file_size, one_line, read_file
from distgpt.errors import DataError

# The most bytes of an index: per file of tensors, and of a small checkpoint. A chunk of a tensor takes about 150.
LARGEST_PER_FILE, LARGEST_OF_SMALL = 2**23, 2**20
# The most values on the stack. pickle fills dicts and lists in batches of 1000, so a real index stays far below this.
DEEPEST_STACK = 2**14
# The least bytes for each dict, list, tuple, record or entry in the memo. A real index takes eight or more.
BYTES_PER_OBJECT, FREE_OBJECTS = 4, 1000
LARGEST_TENSOR, MOST_DIMS = 2**60, 8  # elements
SHARD = re.compile(r"__\d+_\d+\.distcp")


class _InvalidIndex(ValueError):
    """An index that holds something which distgpt does not write."""


@dataclass(frozen=True)
class _Global:
    """A class, function or constant that the index names. It is not imported."""

    module: str
    name: str


@dataclass(eq=False)
class _Record:
    """An object that the index describes."""

    kind: str
    state: Any = None


class _Flat(tuple[Any, ...]):
    """A tuple that holds no tuple. Since nesting is bounded, hashes and messages take little time."""


_METADATA = "torch.distributed.checkpoint.metadata"
_SIZE, _ENUM = _Global("torch", "Size"), _Global(_METADATA, "_MEM_FORMAT_ENCODING")
_GETATTR = _Global("builtins", "getattr")  # gets a member of _ENUM, as Python 3.11 up to 3.11.3 writes it
_DTYPES = {
    _Global("torch", name): getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
}
_RECORDS = {
    _Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(_Global(_METADATA, name) for name in ("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties")),
    *(_Global(_METADATA, name) for name in ("ChunkStorageMetadata", "MetadataIndex")),
}
# Functions whose values are ignored.
_IGNORED = {
    *(_ENUM, _GETATTR, _Global("torch.serialization", "_get_layout"), _Global("collections", "OrderedDict")),
    *(_Global("pathlib", "PosixPath"), _Global("pathlib._local", "PosixPath")),
}
_KNOWN = {_SIZE, *_DTYPES, *_RECORDS, *_IGNORED}


def _unpickle(content: bytes) -> Any:
    """Build the content of an index from dicts, lists, tuples, numbers, strings and records. Raises ValueError."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    made, most = 0, FREE_OBJECTS + len(content) // BYTES_PER_OBJECT
    for operation, value, _ in pickletools.genops(content):
        name, argument = operation.name, cast(Any, value)
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif found := _MAKING.get(name) or _FILLING.get(name):
            number, function = found
            stack.append(function(*_operands(stack, number, marked=name in _MARKED)))
        else:
            _require(name in ("PROTO", "FRAME", "STOP"), f"it uses the operation {name}")
        made += name in _MAKING or name == "GLOBAL"
        _require(max(made, len(memo)) <= most, "it holds too many objects for its size")
        _require(len(stack) <= DEEPEST_STACK, "it puts too many values on the stack")
    return stack.pop()


def _operands(stack: list[Any], number: int, *, marked: bool) -> list[Any]:
    """Take `number` values from the stack, and if `marked` those after the last mark."""
    taken = []
    while marked and (value := stack.pop()) is not _MARK:
        taken.append(value)
    return [*taken, *(stack.pop() for _ in range(number))][::-1]


def _tuple(*items: Any) -> tuple[Any, ...]:
    _require(not any(type(item) is tuple for item in items), "its tuples are nested too deeply")
    return items if any(isinstance(item, tuple) for item in items) else _Flat(items)


def _extend(target: Any, *items: Any) -> Any:
    _typed(target, list).extend(items)
    return target


def _update(target: Any, *items: Any) -> Any:
    for key, value in zip(items[::2], items[1::2], strict=True):
        _typed(target, dict)[_typed(key, str, _Record)] = value
    return target


def _build(record: Any, state: Any) -> Any:
    _typed(record, _Record).state = state
    return record


def _global(module: Any, name: Any) -> _Global:
    found = _Global(_typed(module, str), _typed(name, str))
    _require(found in _KNOWN, f"it asks for {module}.{name}"[:200])
    return found


def _new(kind: Any, arguments: Any) -> _Record:
    _require(_typed(kind, _Global) in _RECORDS and arguments == (), f"it creates a {_name(kind)}")
    return _Record(kind.name)


def _call(function: Any, arguments: Any) -> Any:
    called, given = _typed(function, _Global), _typed(arguments, tuple)
    if called == _GETATTR:
        _require(given[0] == _ENUM, f"it asks for an attribute of {_name(given[0])}")
    _require(called == _SIZE or called in _IGNORED, f"it calls {called.name}")
    return given[0] if called == _SIZE else None


_MARK = object()  # the beginning of a run of items on the stack
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": _Flat(), "MARK": _MARK}
# Operations with operands: how many each takes from the stack, besides those after the last mark, and what it then puts
# there. The first table makes objects, the second fills them.
_MAKING: dict[str, tuple[int, Callable[..., Any]]] = {
    "EMPTY_DICT": (0, dict),
    "EMPTY_LIST": (0, list),
    "TUPLE": (0, _tuple),
    "TUPLE1": (1, _tuple),
    "TUPLE2": (2, _tuple),
    "TUPLE3": (3, _tuple),
    "NEWOBJ": (2, _new),
    "REDUCE": (2, _call),
    "STACK_GLOBAL": (2, _global),
}
_FILLING: dict[str, tuple[int, Callable[..., Any]]] = {
    "APPEND": (2, _extend),
    "APPENDS": (1, _extend),
    "SETITEM": (3, _update),
    "SETITEMS": (1, _update),
    "BUILD": (2, _build),
}
_MARKED = {"TUPLE", "APPENDS", "SETITEMS"}


def read_index(checkpoint: Path) -> Metadata:
    """Read which tensors a checkpoint holds, and where. Raises DataError if its index holds anything else."""
    path = checkpoint / INDEX
    content = read_file(path, _largest_index(checkpoint))
    try:
        fields = _fields(_unpickle(content), "Metadata")
        places = dict(_place(key, record) for key, record in _typed(fields["storage_data"], dict).items())
        tensors = _tensors(_typed(fields["state_dict_metadata"], dict), len(places))
        _require_whole(tensors, places, checkpoint)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is not a valid checkpoint index: {one_line(error)[:200]}") from None
    return Metadata({**tensors}, storage_data=places)


def _largest_index(checkpoint: Path) -> int:
    """Return the most bytes that the index of a checkpoint may have, by the sizes of its files of tensors."""
    sizes = [file_size(file) for file in checkpoint.iterdir() if SHARD.fullmatch(file.name)]
    return max(LARGEST_OF_SMALL, min(sum(sizes), LARGEST_PER_FILE * len(sizes)))


def _tensors(records: dict[Any, Any], places: int) -> dict[str, TensorStorageMetadata]:
    """Read the tensors. Count their chunks before: a short file may name the same long list many times."""
    tensors, count = {}, 0
    for name, record in records.items():
        fields = _fields(record, "TensorStorageMetadata")
        count += len(_typed(fields["chunks"], list))
        _require(count <= places, "its tensors and their places do not agree")
        tensors[_typed(name, str)] = _tensor(name, fields)
    return tensors


def _tensor(name: str, fields: dict[str, Any]) -> TensorStorageMetadata:
    properties = _typed(_typed(fields["properties"], _Record).state, tuple)
    _require(_typed(properties[0], _Global) in _DTYPES, f"{name} is of no known dtype")
    size, chunks = _size(fields["size"]), [_chunk(chunk) for chunk in fields["chunks"]]
    _require(math.prod(size) < LARGEST_TENSOR, f"{name} is too large")
    same_dims = all(len(size) == len(chunk.sizes) == len(chunk.offsets) for chunk in chunks)
    _require(same_dims, f"{name} has chunks of another shape")
    _require(_covers_once(chunks, size), f"{name} has chunks that overlap or leave gaps")
    return TensorStorageMetadata(TensorProperties(_DTYPES[properties[0]]), size, chunks)


def _covers_once(chunks: list[ChunkStorageMetadata], size: torch.Size) -> bool:
    """Tell whether the chunks cover each part of a tensor exactly once. distgpt shards along one dim only."""
    cut = [dim for dim in range(len(size)) if any(chunk.sizes[dim] != size[dim] for chunk in chunks)]
    if len(cut) > 1 or any(chunk.offsets[dim] for chunk in chunks for dim in range(len(size)) if dim not in cut):
        return False
    if not cut:
        return len(chunks) == 1
    spans = sorted((chunk.offsets[cut[0]], chunk.offsets[cut[0]] + chunk.sizes[cut[0]]) for chunk in chunks)
    edges = [0, *(end for _, end in spans)]
    return [start for start, _ in spans] == edges[:-1] and edges[-1] == size[cut[0]]


def _chunk(record: Any) -> ChunkStorageMetadata:
    fields = _fields(record, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(fields["offsets"]), _size(fields["sizes"]))


def _place(key: Any, record: Any) -> tuple[MetadataIndex, _StorageInfo]:
    where, what = _fields(key, "MetadataIndex"), _fields(record, "_StorageInfo")
    file = _typed(what["relative_path"], str)
    _require(SHARD.fullmatch(file) is not None, f"it names the file {file[:100]!r}")
    _require(not what.get("transform_descriptors"), "its tensors are transformed")
    offset, length = (_natural(what[name]) for name in ("offset", "length"))
    return MetadataIndex(_typed(where["fqn"], str), _size(where["offset"])), _StorageInfo(file, offset, length)


def _require_whole(
    tensors: dict[str, TensorStorageMetadata], places: dict[MetadataIndex, _StorageInfo], checkpoint: Path
) -> None:
    """Check that each chunk has one place and each place one chunk, inside its file, and that no two overlap."""
    wanted = {MetadataIndex(name, chunk.offsets) for name, tensor in tensors.items() for chunk in tensor.chunks}
    _require(wanted == places.keys(), "its tensors and their places do not agree")
    _require(len(wanted) == sum(len(tensor.chunks) for tensor in tensors.values()), "it has a chunk twice")
    sizes = {file: file_size(checkpoint / file) for file in {place.relative_path for place in places.values()}}
    for place in places.values():
        inside = place.offset + place.length <= sizes[place.relative_path]
        _require(inside, f"it names bytes beyond the end of {place.relative_path}")
    spans = sorted((place.relative_path, place.offset, place.offset + place.length) for place in places.values())
    for (file, _, end), (next_file, start, _) in pairwise(spans):
        _require(file != next_file or end <= start, f"its tensors overlap in {file}")


def _fields(value: Any, kind: str) -> dict[str, Any]:
    record = _typed(value, _Record)
    _require(record.kind == kind, f"it holds {record.kind} instead of {kind}")
    fields: dict[str, Any] = _typed(record.state, dict)
    return fields


def _size(value: Any) -> torch.Size:
    _require(len(_typed(value, tuple)) <= MOST_DIMS, "it holds a tensor of too many dims")
    return torch.Size([_natural(item) for item in value])


def _natural(value: Any) -> int:
    _require(type(value) is int and 0 <= value < 2**62, "it holds a number that no tensor has")
    return int(value)


def _typed(value: Any, *types: type) -> Any:
    _require(isinstance(value, types), f"it holds {_name(value)} instead of {types[0].__name__.strip('_')}")
    return value


def _name(value: Any) -> str:
    return value.name if isinstance(value, _Global) else type(value).__name__.strip("_")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _InvalidIndex(otherwise)
