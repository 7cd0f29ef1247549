"""Tensors back from a checkpoint, whatever their sharding then and now; no code that it might bring is run."""

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from distgpt.cluster.manifest import STATE, TOKENIZER, RunState, all_broken, committed, damage, one_line, read_state
from distgpt.config import from_dict
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.errors import DataError
from distgpt.model.gpt import GPT


def load_for_inference(run: Path, device: torch.device) -> tuple[GPT, Tokenizer, RunState]:
    """The model of a run directory's newest good checkpoint, in eval mode, with its tokenizer. One process.

    Raises DataError if there is no good checkpoint.
    """
    candidates = committed(run / "checkpoints")
    if not candidates:
        raise DataError(f"{run} holds no checkpoint: train one with python -m distgpt.train --run.dir={run}")
    broken: dict[str, str] = {}
    for checkpoint in candidates:
        problems = damage(checkpoint)
        if problems:
            broken[checkpoint.name] = problems[0]
            continue
        state = read_state(checkpoint)
        config = from_dict(state.config, source=str(checkpoint / STATE))
        model = GPT(config.model, state.vocab_size, state.eot_id)
        read_tensors({"model": model.state_dict()}, checkpoint, None)
        return model.to(device).eval(), load_tokenizer(checkpoint / TOKENIZER), state
    raise DataError(f"{run} {all_broken(broken)}")


def read_tensors(tensors: dict[str, Any], checkpoint: Path, group: dist.ProcessGroup | None) -> None:
    """Fill `tensors` in place, whatever their sharding now and then."""
    reader = _Reader(checkpoint)
    reader.read_metadata()  # here a DataError is one; dcp.load would wrap it in its own
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


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
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


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
