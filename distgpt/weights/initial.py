"""Load the weights that a new run starts from: each rank reads its own part, whatever the sharding of the model."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.futures import Future

from distgpt.checkpoint.choice import choose
from distgpt.checkpoint.manifest import one_line, step_of
from distgpt.checkpoint.reader import read_tensors
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


class WeightsReader(dcp.StorageReader):
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
        self._files, self._vocab_size = files, vocab_size
        self._stored = {name: layout(name, model) for name in state}
        self._shapes = {name: parameter.shape for name, parameter in state.items()}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: the files are open."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept any id, since there is none."""
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe each parameter as one chunk."""
        properties = TensorProperties(dtype=torch.float32)
        tensors: dict[str, Any] = {
            name: TensorStorageMetadata(properties, shape, [ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)])
            for name, shape in self._shapes.items()
        }
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for."""
        for item in plan.items:
            ranges = [range(at, at + count) for at, count in zip(item.storage_offsets, item.lengths, strict=True)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(self.read_parameter(item.storage_index.fqn, *ranges))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

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
                transposed = stored.transposed
                read = (
                    self._files.read(name, *columns, part).T if transposed else self._files.read(name, part, *columns)
                )
                value[first - rows.start : last - rows.start] = read
            begin += count
        return value
