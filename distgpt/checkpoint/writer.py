"""Write the share of one rank of a checkpoint: planned by DCP, hashed while it is written.

Ranks exchange JSON, where DCP's own save exchanges pickles.
"""

import hashlib
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PLACE_FIELDS = ("relative_path", "offset", "length")


class ShareWriter:
    """A save on one rank: plan(), write() with the plans of all ranks, then finish() on rank 0 with all results."""

    def __init__(self, tensors: dict[str, Any], directory: Path, rank: int) -> None:
        self._tensors, self._rank = tensors, rank
        self._files = _HashingFileSystem()
        self._writer = dcp.FileSystemWriter(directory, sync_files=False)  # the files below sync themselves
        self._writer.fs = self._files
        self._planner = dcp.DefaultSavePlanner()
        self._metadata: Metadata | None = None
        self.seconds, self.bytes = 0.0, 0  # written by this rank, without waits for the others

    def plan(self) -> dict[str, Any]:
        """Return the tensors that this rank holds, as JSON."""
        first = self._rank == 0
        self._planner.set_up_planner(self._tensors, self._writer.storage_meta(), first)
        self._writer.set_up_storage_writer(first, rank=self._rank, use_collectives=True)
        plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
        return {"items": [_item_to_json(item) for item in plan.items], "names": plan.planner_data}

    def write(self, plans: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the share of this rank, given the plans of all, from which every rank derives the same shares.

        Returns the place of each tensor, and the size and SHA-256 of each file.
        """
        parsed = [
            SavePlan([_item_from_json(item) for item in plan["items"]], planner_data=_names_from_json(plan["names"]))
            for plan in plans
        ]
        shares, self._metadata = self._planner.create_global_plan(parsed)
        share = self._planner.finish_plan(self._writer.prepare_global_plan(shares)[self._rank])
        started = time.perf_counter()
        results = self._writer.write_data(share, self._planner).wait()
        self.seconds, self.bytes = time.perf_counter() - started, sum(result.size_in_bytes for result in results)
        tensors = [
            [*_index_to_json(r.index), r.size_in_bytes, *(getattr(r.storage_data, k) for k in _PLACE_FIELDS)]
            for r in results
        ]
        return {"tensors": tensors, "files": dict(self._files.written)}

    def finish(self, written: list[dict[str, Any]]) -> None:
        """Write the index, given the results of write() on every rank."""
        assert self._metadata is not None, "write() comes first"
        self._writer.finish(self._metadata, [[_result_from_json(*r) for r in rank["tensors"]] for rank in written])


class _HashingFileSystem(FileSystem):
    """A file system whose files are hashed while they are written, and on the disk once they are closed."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}  # by name, as in a manifest

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; `mode` is "wb"."""
        assert mode == "wb", mode
        with _HashingFile(path) as file:
            yield file
        self.written[Path(path).name] = {"bytes": file.bytes, "sha256": file.digest.hexdigest()}


class _HashingFile(io.BufferedIOBase):
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  close() closes it
        self.digest, self.bytes = hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer") -> int:
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        try:
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            super().close()


def _index_to_json(index: MetadataIndex) -> list[Any]:
    return [index.fqn, index.offset, index.index]


def _index_from_json(name: str, offset: list[int] | None, number: int | None) -> MetadataIndex:
    return MetadataIndex(name, None if offset is None else torch.Size(offset), number)


def _result_from_json(
    name: str, at: list[int] | None, number: int | None, size: int, file: str, offset: int, length: int
) -> WriteResult:
    return WriteResult(_index_from_json(name, at, number), size, _StorageInfo(file, offset, length))


def _item_to_json(item: WriteItem) -> list[Any]:
    data = item.tensor_data
    assert data is not None, "checkpoints hold tensors alone"
    dtype = str(data.properties.dtype).removeprefix("torch.")
    return [_index_to_json(item.index), item.type.name, data.chunk.offsets, data.chunk.sizes, data.size, dtype]


def _item_from_json(item: list[Any]) -> WriteItem:
    index, kind, offsets, sizes, size, name = item
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a rank sent a tensor of the unknown type {name}")
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(size))
    return WriteItem(_index_from_json(*index), WriteItemType[kind], tensor_data=data)


def _names_from_json(names: dict[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(path) for name, path in names.items()}
