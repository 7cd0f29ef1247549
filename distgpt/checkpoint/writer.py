"""The ranks' shares of one checkpoint, planned by DCP. What ranks tell each other is JSON, where DCP's save pickles."""

import time
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

_PLACE = ("relative_path", "offset", "length")


class Saving:
    """One save on one rank: plan, write with all ranks' plans, then finish on rank 0 with all ranks' writes."""

    def __init__(self, tensors: dict[str, Any], writer: dcp.FileSystemWriter, rank: int) -> None:
        self._tensors, self._writer, self._rank = tensors, writer, rank
        self._planner = dcp.DefaultSavePlanner()
        self._metadata: Metadata | None = None

    def plan(self) -> dict[str, Any]:
        """What this rank holds."""
        first = self._rank == 0
        self._planner.set_up_planner(self._tensors, self._writer.storage_meta(), first)
        self._writer.set_up_storage_writer(first, rank=self._rank, use_collectives=True)
        plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
        return {"items": [_item_to_json(item) for item in plan.items], "names": plan.planner_data}

    def write(self, plans: list[dict[str, Any]]) -> list[list[Any]]:
        """Write this rank's share; every rank divides the work alike. What was written where."""
        parsed = [
            SavePlan([_item_from_json(item) for item in plan["items"]], planner_data=_names_from_json(plan["names"]))
            for plan in plans
        ]
        shares, self._metadata = self._planner.create_global_plan(parsed)
        mine = self._planner.finish_plan(self._writer.prepare_global_plan(shares)[self._rank])
        written = self._writer.write_data(mine, self._planner).wait()
        return [
            [*_index_to_json(r.index), r.size_in_bytes, *(getattr(r.storage_data, k) for k in _PLACE)] for r in written
        ]

    def finish(self, results: list[list[list[Any]]]) -> None:
        """Write the index."""
        assert self._metadata is not None, "write() comes first"
        self._writer.finish(self._metadata, [[_result_from_json(*r) for r in written] for written in results])


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
        raise ValueError(f"a rank told of a tensor of the type {name}")
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(size))
    return WriteItem(_index_from_json(*index), WriteItemType[kind], tensor_data=data)


def _names_from_json(names: dict[str, list[Any]]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(path) for name, path in names.items()}


class _TimedWriter(dcp.FileSystemWriter):
    """Knows how much this rank wrote itself and how long that took, without what it waits for the others."""

    seconds, bytes = 0.0, 0

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        started = time.perf_counter()
        written = super().write_data(plan, planner)
        self.bytes = sum(result.size_in_bytes for result in written.wait())
        self.seconds = time.perf_counter() - started
        return written
