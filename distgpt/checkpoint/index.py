"""The index of a checkpoint, DCP's .metadata, read as data: tensors, their chunks, and the place of each in a file.

DCP writes it as a pickle, which is never unpickled here. A small reader knows the few operations that such an index
needs. It builds plain values and imports nothing. The values are then checked field by field.
"""

import math
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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

_DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "MetadataIndex"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
# Globals besides the records: torch.Size, dtypes, and functions whose values are ignored.
_OTHERS = {
    "torch": ("Size", *_DTYPES),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "builtins": ("getattr",),  # a member of an Enum, as Python 3.11 up to 3.11.3 writes it
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}


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


class _Mark:
    """The beginning of a run of items on the stack."""


_VALUES = frozenset(
    (
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
        *("SHORT_BINUNICODE", "BINUNICODE", "EMPTY_TUPLE"),
    )
)
_SILENT = frozenset(("PROTO", "FRAME"))
_MAKING = frozenset(
    ("EMPTY_DICT", "EMPTY_LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NEWOBJ", "REDUCE", "GLOBAL", "STACK_GLOBAL")
)
_PUT, _GET = frozenset(("MEMOIZE", "BINPUT", "LONG_BINPUT")), frozenset(("BINGET", "LONG_BINGET"))


class _IndexReader:
    """Builds the content of an index from dicts, lists, tuples, numbers, strings and records. Raises ValueError."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._actions: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._stack.append(_Mark),
            "EMPTY_DICT": lambda: self._stack.append({}),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "TUPLE": lambda: self._tuple(self._items()),
            **{f"TUPLE{n}": partial(self._tuple_of, n) for n in (1, 2, 3)},
            "APPEND": lambda: self._extend([self._pop()]),
            "APPENDS": lambda: self._extend(self._items()),
            "SETITEM": lambda: self._update(self._last(2)),
            "SETITEMS": lambda: self._update(self._items()),
            "STACK_GLOBAL": self._stack_global,
            "NEWOBJ": self._new,
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def read(self, content: bytes) -> Any:
        made, most = 0, FREE_OBJECTS + len(content) // BYTES_PER_OBJECT
        for operation, value, _ in pickletools.genops(content):
            name, argument = operation.name, cast(Any, value)
            made += name in _MAKING
            _require(max(made, len(self._memo)) <= most, "it holds too many objects for its size")
            if name in _VALUES:
                self._stack.append(_VALUE_OF.get(name, argument))
            elif name in _PUT:
                self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]
            elif name in _GET:
                self._stack.append(self._memo[argument])
            elif name == "GLOBAL":
                self._global(*argument.split(" ", 1))
            elif name in self._actions:
                self._actions[name]()
            elif name not in _SILENT and name != "STOP":
                raise _InvalidIndex(f"it uses the operation {name}")
            _require(len(self._stack) <= DEEPEST_STACK, "it puts too many values on the stack")
        return self._pop()

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _Mark:
            raise _InvalidIndex("its marks do not match")
        return value

    def _items(self) -> list[Any]:
        items = []
        while (value := self._stack.pop()) is not _Mark:
            items.append(value)
        return items[::-1]

    def _last(self, number: int) -> list[Any]:
        return [self._pop() for _ in range(number)][::-1]

    def _tuple_of(self, number: int) -> None:
        self._tuple(self._last(number))

    def _tuple(self, items: list[Any]) -> None:
        if any(type(item) is tuple for item in items):
            raise _InvalidIndex("its tuples are nested too deeply")
        flat = not any(isinstance(item, tuple) for item in items)
        self._stack.append(_Flat(items) if flat else tuple(items))

    def _extend(self, items: list[Any]) -> None:
        _typed(self._stack[-1], list).extend(items)

    def _update(self, items: list[Any]) -> None:
        target = _typed(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_typed(key, str, _Record)] = value

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(_typed(module, str), _typed(name, str))

    def _global(self, module: str, name: str) -> None:
        if name not in (*_RECORDS.get(module, ()), *_OTHERS.get(module, ())):
            raise _InvalidIndex(f"it asks for {module}.{name}"[:200])
        self._stack.append(_Global(module, name))

    def _new(self) -> None:
        arguments, kind = self._pop(), _typed(self._pop(), _Global)
        if arguments != () or kind.name not in _RECORDS.get(kind.module, ()):
            raise _InvalidIndex(f"it creates a {kind.name}")
        self._stack.append(_Record(kind.name))

    def _reduce(self) -> None:
        arguments, function = _typed(self._pop(), tuple), _typed(self._pop(), _Global)
        if function.name == "getattr":
            _require(arguments[0] == _Global(*_ENUM), f"it asks for an attribute of {_name(arguments[0])}")
        size = function == _Global("torch", "Size")
        _require(size or (function.module, function.name) in _IGNORED, f"it calls {function.name}")
        self._stack.append(arguments[0] if size else None)

    def _build(self) -> None:
        state = self._pop()
        _typed(self._stack[-1], _Record).state = state


_VALUE_OF: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": _Flat()}
_ENUM = "torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"
_IGNORED = {(m, n) for m, names in _OTHERS.items() for n in names if n not in _DTYPES}


def read_index(checkpoint: Path) -> Metadata:
    """Read which tensors a checkpoint holds, and where. Raises DataError if its index holds anything else."""
    path = checkpoint / INDEX
    content = read_file(path, _largest_index(checkpoint))
    try:
        fields = _fields(_IndexReader().read(content), "Metadata")
        places = dict(_place(key, record) for key, record in _typed(fields["storage_data"], dict).items())
        records = _typed(fields["state_dict_metadata"], dict)
        _require_few_chunks(records, len(places))
        tensors = {_typed(name, str): _tensor(name, record) for name, record in records.items()}
        _require_whole(tensors, places, checkpoint)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} is not a valid checkpoint index: {one_line(error)[:200]}") from None
    return Metadata({**tensors}, storage_data=places)


def _largest_index(checkpoint: Path) -> int:
    """Return the most bytes that the index of a checkpoint may have, by the sizes of its files of tensors."""
    sizes = [file_size(file) for file in checkpoint.iterdir() if SHARD.fullmatch(file.name)]
    return max(LARGEST_OF_SMALL, min(sum(sizes), LARGEST_PER_FILE * len(sizes)))


def require_tensors(index: Metadata, wanted: Mapping[str, Any], path: Path) -> None:
    """Raise DataError unless an index holds exactly the tensors of a nested dict, with their shapes and dtypes.

    It may also hold tensors of other parts of a run, such as its optimizer or another replica.
    """
    tensors = _flattened(wanted)
    parts = {_part(name) for name in tensors}
    for name in sorted(tensors.keys() | index.state_dict_metadata.keys()):
        known, held = tensors.get(name), index.state_dict_metadata.get(name)
        if not isinstance(held, TensorStorageMetadata):
            raise DataError(f"{path} holds no {name}")
        if known is None:
            if _part(name) in parts or name.split(".")[0] not in ("model", "optim", "outer", "replica"):
                raise DataError(f"{path} holds {name[:100]}, which the model does not have")
            continue
        then, now = (held.size, held.properties.dtype), (known.shape, known.dtype)
        if then != now:
            raise DataError(f"{path} holds {name} as {_shown(*then)}, and the model has {_shown(*now)}")


def _flattened(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        flat |= _flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _part(name: str) -> tuple[str, ...]:
    """Return the part of a run that a tensor belongs to: the model, its optimizer, or one replica."""
    first, *rest = name.split(".")
    return (first, *rest[: 1 if first == "replica" else 0])


def _shown(size: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(size)}"


def _require_few_chunks(records: dict[str, Any], places: int) -> None:
    """Count chunks before they are read one by one: a short file may name the same long list many times."""
    count = 0
    for record in records.values():
        count += len(_typed(_fields(record, "TensorStorageMetadata")["chunks"], list))
        _require(count <= places, "its tensors and their places do not agree")


def _tensor(name: str, record: Any) -> TensorStorageMetadata:
    fields = _fields(record, "TensorStorageMetadata")
    properties = _typed(_typed(fields["properties"], _Record).state, tuple)
    dtype = _typed(properties[0], _Global)
    _require(dtype.name in _DTYPES, f"{name} is of no known dtype")
    size = _size(fields["size"])
    chunks = [_chunk(chunk) for chunk in _typed(fields["chunks"], list)]
    _require(math.prod(size) < LARGEST_TENSOR, f"{name} is too large")
    same_dims = all(len(size) == len(chunk.sizes) == len(chunk.offsets) for chunk in chunks)
    _require(same_dims, f"{name} has chunks of another shape")
    _require(_covers_once(chunks, size), f"{name} has chunks that overlap or leave gaps")
    return TensorStorageMetadata(TensorProperties(getattr(torch, dtype.name)), size, chunks)


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
