"""Read the index of a checkpoint: its tensors, their chunks, and the place of each chunk in a file.

The index is DCP's file .metadata, a pickle. Unpickling a file of unknown origin could run its code. So the small reader
here knows only the few pickle operations that such an index needs. It builds plain values and imports nothing. The
values are then checked field by field.
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

# Limits of the size of an index, in bytes; a chunk of a tensor takes about 150. Any index may have SMALL_INDEX_BYTES.
MAX_INDEX_BYTES_PER_SHARD, SMALL_INDEX_BYTES = 2**23, 2**20
# pickle fills dicts and lists in batches of 1000, so a real index stays far below this limit.
MAX_STACK_VALUES = 2**14
# An index may create FREE_OBJECTS dicts, lists, tuples, records and memo entries, and one more for each
# MIN_BYTES_PER_OBJECT of its size. A real index takes eight bytes or more for each.
MIN_BYTES_PER_OBJECT, FREE_OBJECTS = 4, 1000
# Limits of one tensor.
MAX_ELEMENTS, MAX_DIMS = 2**60, 8
SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")


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
    """A tuple without tuples in it. Other tuples hold only flat ones, so that hashing or printing one is quick."""


_METADATA = "torch.distributed.checkpoint.metadata"
_SIZE, _MEMORY_FORMAT = _Global("torch", "Size"), _Global(_METADATA, "_MEM_FORMAT_ENCODING")
_GETATTR = _Global("builtins", "getattr")  # gets a member of _MEMORY_FORMAT, as Python 3.11 up to 3.11.3 writes it
_DTYPES = {
    _Global("torch", name): getattr(torch, name)
    for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
}
_RECORDS = {
    _Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(_Global(_METADATA, name) for name in ("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties")),
    *(_Global(_METADATA, name) for name in ("ChunkStorageMetadata", "MetadataIndex")),
}
# Functions that an index may call; the result is not used.
_IGNORED = {
    _MEMORY_FORMAT,
    _GETATTR,
    _Global("torch.serialization", "_get_layout"),
    _Global("collections", "OrderedDict"),
    _Global("pathlib", "PosixPath"),
    _Global("pathlib._local", "PosixPath"),
}
_KNOWN = {_SIZE, *_DTYPES, *_RECORDS, *_IGNORED}


def _unpickle(content: bytes) -> Any:
    """Build the content of an index from dicts, lists, tuples, numbers, strings and records. Raises ValueError."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    created, max_objects = 0, FREE_OBJECTS + len(content) // MIN_BYTES_PER_OBJECT
    for operation, value, _ in pickletools.genops(content):
        name, argument = operation.name, cast(Any, value)
        if name in _PUSHES_ARGUMENT:
            stack.append(argument)
        elif name in _PUSHES_CONSTANT:
            stack.append(_PUSHES_CONSTANT[name])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_global(*argument.split(" ", 1)))
        elif found := _CREATING.get(name) or _FILLING.get(name):
            number, function = found
            stack.append(function(*_pop_operands(stack, number, with_mark=name in _WITH_MARK)))
        else:
            _require(name in ("PROTO", "FRAME", "STOP"), f"it uses the operation {name}")
        created += name in _CREATING or name == "GLOBAL"
        _require(max(created, len(memo)) <= max_objects, "it holds too many objects for its size")
        _require(len(stack) <= MAX_STACK_VALUES, "it puts too many values on the stack")
    return stack.pop()


def _pop_operands(stack: list[Any], number: int, *, with_mark: bool) -> list[Any]:
    """Pop the values after the last mark, if `with_mark`, then `number` more. Returns them in stack order."""
    taken = []
    while with_mark and (value := stack.pop()) is not _MARK:
        taken.append(value)
    return [*taken, *(stack.pop() for _ in range(number))][::-1]


def _tuple(*items: Any) -> tuple[Any, ...]:
    _require(not any(type(item) is tuple for item in items), "its tuples are nested too deeply")
    return items if any(isinstance(item, tuple) for item in items) else _Flat(items)


def _extend(target: Any, *items: Any) -> Any:
    _require_type(target, list).extend(items)
    return target


def _update(target: Any, *items: Any) -> Any:
    for key, value in zip(items[::2], items[1::2], strict=True):
        _require_type(target, dict)[_require_type(key, str, _Record)] = value
    return target


def _build(record: Any, state: Any) -> Any:
    _require_type(record, _Record).state = state
    return record


def _global(module: Any, name: Any) -> _Global:
    found = _Global(_require_type(module, str), _require_type(name, str))
    _require(found in _KNOWN, f"it asks for {module}.{name}"[:200])
    return found


def _new(kind: Any, arguments: Any) -> _Record:
    _require(_require_type(kind, _Global) in _RECORDS and arguments == (), f"it creates a {_name(kind)}")
    return _Record(kind.name)


def _call(function: Any, arguments: Any) -> Any:
    called, given = _require_type(function, _Global), _require_type(arguments, tuple)
    if called == _GETATTR:
        _require(given[0] == _MEMORY_FORMAT, f"it asks for an attribute of {_name(given[0])}")
    _require(called == _SIZE or called in _IGNORED, f"it calls {called.name}")
    return given[0] if called == _SIZE else None


_MARK = object()  # on the stack, before the items of a tuple, list or dict
# Operations that push their argument, and operations that push a constant.
_PUSHES_ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE"}
_PUSHES_CONSTANT: dict[str, Any] = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": _Flat(),
    "MARK": _MARK,
}
# Operations that pop operands: their number, besides those after the last mark, and the function of them whose result
# is pushed. The first table creates objects, the second fills them.
_CREATING: dict[str, tuple[int, Callable[..., Any]]] = {
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
_WITH_MARK = {"TUPLE", "APPENDS", "SETITEMS"}


def read_index(checkpoint: Path) -> Metadata:
    """Read which tensors a checkpoint holds, and where. Raises DataError if its index holds anything else."""
    path = checkpoint / INDEX
    content = read_file(path, _largest_index(checkpoint))
    try:
        fields = _fields(_unpickle(content), "Metadata")
        places = dict(_place(key, record) for key, record in _require_type(fields["storage_data"], dict).items())
        tensors = _tensors(_require_type(fields["state_dict_metadata"], dict), len(places))
        _require_consistent(tensors, places, checkpoint)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is not a valid checkpoint index: {one_line(error)[:200]}") from None
    return Metadata({**tensors}, storage_data=places)


def _largest_index(checkpoint: Path) -> int:
    """Return the largest allowed size of the index, in bytes: no more than the size of all shards, if that is large."""
    sizes = [file_size(file) for file in checkpoint.iterdir() if SHARD_NAME.fullmatch(file.name)]
    return max(SMALL_INDEX_BYTES, min(sum(sizes), MAX_INDEX_BYTES_PER_SHARD * len(sizes)))


def _tensors(records: dict[Any, Any], places: int) -> dict[str, TensorStorageMetadata]:
    """Read the tensors. Their chunks are counted first, since a short file may name the same long list many times."""
    tensors, count = {}, 0
    for name, record in records.items():
        fields = _fields(record, "TensorStorageMetadata")
        count += len(_require_type(fields["chunks"], list))
        _require(count <= places, "its tensors and their places do not agree")
        tensors[_require_type(name, str)] = _tensor(name, fields)
    return tensors


def _tensor(name: str, fields: dict[str, Any]) -> TensorStorageMetadata:
    properties = _require_type(_require_type(fields["properties"], _Record).state, tuple)
    _require(_require_type(properties[0], _Global) in _DTYPES, f"{name} is of no known dtype")
    size, chunks = _size(fields["size"]), [_chunk(chunk) for chunk in fields["chunks"]]
    _require(math.prod(size) < MAX_ELEMENTS, f"{name} is too large")
    same_dims = all(len(size) == len(chunk.sizes) == len(chunk.offsets) for chunk in chunks)
    _require(same_dims, f"{name} has chunks of another shape")
    _require(_covers_once(chunks, size), f"{name} has chunks that overlap or leave gaps")
    return TensorStorageMetadata(TensorProperties(_DTYPES[properties[0]]), size, chunks)


def _covers_once(chunks: list[ChunkStorageMetadata], size: torch.Size) -> bool:
    """Tell whether the chunks cover each part of a tensor exactly once. distgpt shards along one dim only."""
    sharded = [dim for dim in range(len(size)) if any(chunk.sizes[dim] != size[dim] for chunk in chunks)]
    whole = [dim for dim in range(len(size)) if dim not in sharded]
    if len(sharded) > 1 or any(chunk.offsets[dim] for chunk in chunks for dim in whole):
        return False
    if not sharded:
        return len(chunks) == 1
    dim = sharded[0]
    spans = sorted((chunk.offsets[dim], chunk.offsets[dim] + chunk.sizes[dim]) for chunk in chunks)
    edges = [0, *(end for _, end in spans)]
    return [start for start, _ in spans] == edges[:-1] and edges[-1] == size[dim]


def _chunk(record: Any) -> ChunkStorageMetadata:
    fields = _fields(record, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(fields["offsets"]), _size(fields["sizes"]))


def _place(key: Any, record: Any) -> tuple[MetadataIndex, _StorageInfo]:
    chunk, place = _fields(key, "MetadataIndex"), _fields(record, "_StorageInfo")
    file = _require_type(place["relative_path"], str)
    _require(SHARD_NAME.fullmatch(file) is not None, f"it names the file {file[:100]!r}")
    _require(not place.get("transform_descriptors"), "its tensors are transformed")
    offset, length = (_natural_number(place[name]) for name in ("offset", "length"))
    return MetadataIndex(_require_type(chunk["fqn"], str), _size(chunk["offset"])), _StorageInfo(file, offset, length)


def _require_consistent(
    tensors: dict[str, TensorStorageMetadata], places: dict[MetadataIndex, _StorageInfo], checkpoint: Path
) -> None:
    """Check that each chunk has exactly one place, inside its file, and that no two places overlap."""
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
    record = _require_type(value, _Record)
    _require(record.kind == kind, f"it holds {record.kind} instead of {kind}")
    fields: dict[str, Any] = _require_type(record.state, dict)
    return fields


def _size(value: Any) -> torch.Size:
    _require(len(_require_type(value, tuple)) <= MAX_DIMS, "it holds a tensor of too many dims")
    return torch.Size([_natural_number(item) for item in value])


def _natural_number(value: Any) -> int:
    _require(type(value) is int and 0 <= value < 2**62, "it holds a number that no tensor has")
    return int(value)


def _require_type(value: Any, *types: type) -> Any:
    _require(isinstance(value, types), f"it holds {_name(value)} instead of {types[0].__name__.strip('_')}")
    return value


def _name(value: Any) -> str:
    return value.name if isinstance(value, _Global) else type(value).__name__.strip("_")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _InvalidIndex(otherwise)
