"""Load the weights that a new run starts from: each rank reads its own part, whatever the sharding of the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from distgpt.checkpoint.choice import choose
from distgpt.checkpoint.manifest import one_line, step_of
from distgpt.checkpoint.reader import TensorReader, read_tensors
from distgpt.config import Config, ModelConfig
from distgpt.corpus.shards import Dataset
from distgpt.distributed.collectives import broadcast_from_rank_zero
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.distributed.plan import Plan
from distgpt.errors import DataError, UsageError
from distgpt.weights.files import WeightFiles
from distgpt.weights.names import Layout, layout_of
from distgpt.weights.source import is_plain, is_weights, parse, read_model


def load_initial_weights(
    config: Config, plan: Plan, dataset: Dataset, model: nn.Module, outer: OuterOptimizer | None
) -> str:
    """Load the weights that init.from names into a model; return a line that says so. All ranks call it.

    Raises DataError.
    """
    path, choice = parse(config.init.from_)
    state = get_model_state_dict(model)
    if is_weights(path):
        layout = layout_of(plain=is_plain(path))
        reader = WeightsReader(WeightFiles(path), read_model(path), layout, state, vocab_size=dataset.vocab_size)
        try:
            dcp.load(state, storage_reader=reader, no_dist=True)  # else ranks exchange pickles
        except dcp.CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            if not isinstance(cause, SafetensorError | DataError):
                raise
            raise DataError(f"{path} cannot be read: {one_line(cause)}") from None
        line = f"starting from the weights in {path}"
    else:
        checkpoint = _choose_on_rank_zero(path, choice, plan)
        read_tensors({"model": state}, checkpoint)
        line = f"starting from the weights of step {step_of(checkpoint):,} in {path}"
    set_model_state_dict(model, state)
    if outer:
        outer.reset()
    return line


def _choose_on_rank_zero(path: Path, choice: str, plan: Plan) -> Path:
    """Return the checkpoint that rank 0 chooses and verifies, so that all ranks read one. Raises DataError on all."""
    answer = {}
    if plan.runtime.rank == 0:
        try:
            answer = {"checkpoint": str(choose(path, choice))}
        except (UsageError, DataError) as error:
            answer = {"error": str(error)}
    answer = broadcast_from_rank_zero(answer, plan.runtime)
    if "error" in answer:
        raise DataError(f"init.from: {answer['error']}")
    return Path(answer["checkpoint"])


class WeightsReader(TensorReader):
    """Reads the part of each parameter that a rank holds from files of another layout."""

    def __init__(
        self,
        files: WeightFiles,
        model: ModelConfig,
        layout: Layout,
        state: dict[str, Any],
        *,
        vocab_size: int,
    ) -> None:
        """`state`: the parameters to read. `vocab_size`: rows after it pad the vocabulary, and are zero."""
        properties = TensorProperties(dtype=torch.float32)
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(properties, p.shape, [ChunkStorageMetadata(torch.Size([0] * p.ndim), p.shape)])
            for name, p in state.items()  # each parameter as one chunk
        }
        super().__init__(files.directory, Metadata(tensors, storage_data={}))
        self._files, self._vocab_size = files, vocab_size
        self._stored = {name: layout(name, model) for name in state}

    def read_part(self, stored: MetadataIndex, ranges: Sequence[range]) -> Tensor:
        """Read a part of the parameter that `stored` names."""
        return self.read_parameter(stored.fqn, *ranges)

    def read_parameter(self, parameter: str, rows: range, *columns: range) -> Tensor:
        """Read these rows of a parameter, and these columns if it is a matrix."""
        stored = self._stored[parameter]
        value = torch.zeros(len(rows), *map(len, columns))
        begin = 0
        for number, name in enumerate(map(self._files.find, stored.names)):
            count = stored.rows[number] if stored.rows else self._files.shape(name)[int(stored.transposed)]
            if parameter in ("token_embedding.weight", "head.weight", "head.bias"):
                count = min(count, self._vocab_size)
            first, last = max(rows.start, begin), min(rows.stop, begin + count)
            if first < last:
                part = range(first - begin, last - begin)
                ranges = (*columns, part) if stored.transposed else (part, *columns)
                read = self._files.read(name, *ranges)
                value[first - rows.start : last - rows.start] = read.T if stored.transposed else read
            begin += count
        return value
