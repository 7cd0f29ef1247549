"""Write one rank's share of a checkpoint. DCP plans it, and its files are hashed while they are written.

Ranks exchange JSON, where DCP's own save exchanges pickles.
"""

import hashlib
import io
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

# Less is hashed sooner than a thread wakes up.
MIN_BYTES_FOR_THREAD = 2**18


class ShareWriter:
    """Writes the share of one rank: plan(), then write() with all plans, then on rank 0 finish() with all results."""

    def __init__(self, tensors: dict[str, Any], directory: Path, rank: int) -> None:
        self._tensors, self._rank = tensors, rank
        self._files = _HashingFileSystem()
        # The file system syncs. With a copy ahead, DCP would wait for the stream that trains.
        self._writer = dcp.FileSystemWriter(directory, sync_files=False, per_thread_copy_ahead=0)
        self._writer.fs = self._files
        self._planner = dcp.DefaultSavePlanner()
        self._metadata: Metadata | None = None
        self.seconds, self.bytes = 0.0, 0  # of writing on this rank, without waits for other ranks

    def plan(self) -> dict[str, Any]:
        """Return the tensors that this rank holds, as JSON."""
        is_coordinator = self._rank == 0
        self._planner.set_up_planner(self._tensors, self._writer.storage_meta(), is_coordinator)
        self._writer.set_up_storage_writer(is_coordinator, rank=self._rank, use_collectives=True)
        plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
        return {"items": [_item_to_json(item) for item in plan.items], "names": plan.planner_data}

    def write(self, plans: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the share of this rank, given the plans of all, from which every rank derives the same shares.

        Returns the place of each tensor, and the size and SHA-256 of each file.
        """
        shares, self._metadata = self._planner.create_global_plan([_plan_from_json(**plan) for plan in plans])
        share = self._planner.finish_plan(self._writer.prepare_global_plan(shares)[self._rank])
        started = time.perf_counter()
        results = self._writer.write_data(share, self._planner).wait()
        self.seconds, self.bytes = time.perf_counter() - started, sum(result.size_in_bytes for result in results)
        tensors = [[_index_to_json(r.index), r.size_in_bytes, astuple(r.storage_data)] for r in results]
        return {"tensors": tensors, "files": dict(self._files.written)}

    def finish(self, written: list[dict[str, Any]]) -> None:
        """Write the index, given the results of write() on every rank."""
        assert self._metadata is not None, "write() comes first"
        results = [
            WriteResult(_index_from_json(*index), size, _StorageInfo(*place))
            for share in written
            for index, size, place in share["tensors"]
        ]
        self._writer.finish(self._metadata, [results])


class _HashingFileSystem(FileSystem):
    """A file system that hashes files while they are written, and syncs them to the disk before they are closed."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}  # by name, as in a manifest

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; `mode` is "wb"."""
        assert mode == "wb", mode
        with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as thread:
            hashing = _HashingFile(file, thread)
            with io.BufferedWriter(hashing) as stream:
                yield stream
            os.fsync(file.fileno())
        self.written[Path(path).name] = {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


class _HashingFile(io.RawIOBase):
    """Writes to a file while a thread hashes the same bytes, since a disk and SHA-256 are about equally fast."""

    def __init__(self, file: io.FileIO, thread: ThreadPoolExecutor) -> None:
        self._file, self._thread = file, thread
        self.digest, self.bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write all bytes."""
        view = memoryview(data)
        if len(view) < MIN_BYTES_FOR_THREAD:
            self.digest.update(view)
            self._write_all(view)
        else:
            hashed = self._thread.submit(self.digest.update, view)
            try:
                self._write_all(view)
                self._start_writeback(len(view))
            finally:
                hashed.result()  # the caller may reuse the memory
        self.bytes += len(view)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        written = 0
        while written < len(view):  # one call writes at most 2 GiB
            written += self._file.write(view[written:])

    def _start_writeback(self, size: int) -> None:
        """Let the kernel begin to write the last `size` bytes to the disk, as it does with pages that are not needed.

        Otherwise fsync would begin with that, after the last byte.
        """
        if sys.platform == "linux":
            with suppress(OSError):  # a hint alone
                os.posix_fadvise(self._file.fileno(), self.tell() - size, size, os.POSIX_FADV_DONTNEED)

    def tell(self) -> int:
        return self._file.tell()

    def writable(self) -> bool:
        return True


def _index_to_json(index: MetadataIndex) -> list[Any]:
    return [index.fqn, index.offset, index.index]


def _index_from_json(name: str, offset: list[int] | None, number: int | None) -> MetadataIndex:
    return MetadataIndex(name, None if offset is None else torch.Size(offset), number)


def _plan_from_json(items: list[list[Any]], names: dict[str, list[Any]]) -> SavePlan:
    return SavePlan(list(map(_item_from_json, items)), planner_data={name: tuple(path) for name, path in names.items()})


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
