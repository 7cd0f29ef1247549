"""The cells of the equivalence matrix, and the program that trains them: a process for each rank, cell after cell.

Usage, in the process of rank $RANK: `python -m tests.end_to_end.equivalence DATASET STEPS CELLS DIRECTORY`. CELLS is a
JSON file with the fields of each cell. As many ranks as a cell has train it; rank 0 writes its figures to DIRECTORY.
"""

import gc
import itertools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from distgpt.config import resolve
from distgpt.corpus.shards import Dataset, open_dataset
from distgpt.distributed.collectives import grad_norm_of, reduce_scalars
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.process_group import LOOPBACK, init_process_group
from distgpt.distributed.runtime import Runtime
from distgpt.model.optim import build_optimizer, lr_at, set_lr
from distgpt.training.figures import FigureReader, not_finite
from distgpt.training.startup import training_batches
from distgpt.training.step import accumulate_gradients, apply_update

MOST_RANKS = 4
TIMEOUT = 120.0
# Matrices have 65, 22, 20, 13 and 10 rows. None divides by 3, and only 20 by 4, so that shards are uneven.
MODEL = (
    *("--model.n_layer=1", "--model.n_embd=10", "--model.n_head=2", "--model.n_kv_head=1", "--model.mlp_hidden=22"),
    *("--model.block_size=13", "--model.vocab_multiple=1", "--model.document_mask"),
    *("--model.dropout=0.2", "--model.embedding_dropout"),
)
TRAINING = ("--train.global_batch=48", "--optim.lr=1e-3", "--optim.grad_clip=1.0")

# Ranks that share a replica with hsdp: all, but for two replicas of four ranks.
SHARD = {1: 0, 2: 2, 3: 3, 4: 2}

Curve = list[tuple[float, float]]  # loss and gradient norm of each step


@dataclass(frozen=True)
class Cell:
    """One way to train the same steps."""

    ranks: int
    strategy: str
    accumulation: int
    recompute: bool
    dtype: str
    optimizer: str

    def arguments(self) -> list[str]:
        """Return the options of distgpt.train."""
        return [
            *(*MODEL, *TRAINING, f"--train.micro_batch={48 // (self.ranks * self.accumulation)}"),
            f"--parallel.strategy={'auto' if self.strategy == 'single' else self.strategy}",
            f"--parallel.shard={SHARD[self.ranks]}",
            f"--parallel.activation_checkpoint={str(self.recompute).lower()}",
            f"--train.dtype={self.dtype}",
            f"--optim.name={self.optimizer}",
        ]

    def reference(self) -> "Cell":
        """Return the cell that this one must equal: one process, one micro-batch a step."""
        return replace(self, ranks=1, strategy="single", accumulation=1, recompute=False)


LAYOUTS = [(1, "single"), *itertools.product((2, 3, 4), ("ddp", "fsdp", "hsdp"))]
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
ALL = [
    Cell(ranks, strategy, accumulation, recompute, dtype, optimizer)
    for accumulation, recompute, dtype, optimizer in itertools.product((1, 2, 4), (False, True), DTYPES, OPTIMIZERS)
    for ranks, strategy in LAYOUTS
]
# Every value of every axis. Each strategy with and without recomputation, in both data types, with both optimizers.
CORNERS = [
    Cell(1, "single", 1, True, "float32", "adamw"),
    Cell(1, "single", 2, False, "bfloat16", "muon"),
    Cell(3, "ddp", 2, True, "bfloat16", "adamw"),
    Cell(2, "ddp", 4, False, "float32", "muon"),
    Cell(4, "fsdp", 1, True, "float32", "adamw"),
    Cell(3, "fsdp", 2, False, "bfloat16", "muon"),
    Cell(4, "hsdp", 2, False, "float32", "muon"),
    Cell(2, "hsdp", 1, True, "bfloat16", "adamw"),
]


def with_references(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells and those that they must equal, each once, by number of ranks."""
    return sorted({cell.reference() for cell in cells} | set(cells), key=astuple)


def train(cell: Cell, runtime: Runtime, dataset: Dataset, steps: int) -> Curve:
    """Train a cell from its start, as distgpt.train does."""
    config = resolve(cell.arguments(), {})
    plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
    assert (plan.strategy, plan.accumulation) == (cell.strategy, cell.accumulation)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=dataset.eot_id)
    optimizer = build_optimizer(model, config.optim, runtime.device.type, plan.dtype)
    reader, curve = FigureReader(runtime, at_once=True), []
    with closing(training_batches(config, plan, dataset, start_step=0)) as batches:
        for step in range(1, steps + 1):
            lr = set_lr(optimizer, lr_at(step - 1, config.optim, steps))
            loss = accumulate_gradients(model, batches.next_step(), step, plan, seed=config.run.seed)
            norm = grad_norm_of(model)
            reader.add(step, sums := reduce_scalars(loss, norm, False, runtime), lr=lr)
            apply_update(optimizer, norm, clip=config.optim.grad_clip, skip=not_finite(sums))
            optimizer.zero_grad()
            curve += [(figures.loss, figures.grad_norm) for figures in reader.take(now=True)]
    return curve


def train_all(cells: Sequence[Cell], rank: int, dataset: Dataset, steps: int, directory: Path) -> None:
    """Train those of the cells that this rank takes part in, in a process group for each number of ranks."""
    for ranks, group in itertools.groupby(enumerate(cells), key=lambda numbered: numbered[1].ranks):
        if rank >= ranks:
            continue
        runtime = Runtime(rank, rank, ranks, ranks, torch.device("cpu"))
        if runtime.distributed:
            init_process_group(runtime, dist.FileStore(str(directory / f"store-{ranks}"), ranks), TIMEOUT)
        for number, cell in group:
            curve = train(cell, runtime, dataset, steps)
            if rank == 0:
                (directory / f"{number}.json").write_text(json.dumps(curve))
        if runtime.distributed:
            gc.collect()  # frees models that hooks tied into cycles
            dist.destroy_process_group()


def main(data: str, steps: str, cells: str, directory: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    read = [Cell(**fields) for fields in json.loads(Path(cells).read_text())]
    train_all(read, int(os.environ["RANK"]), open_dataset(Path(data)), int(steps), Path(directory))


def to_json(cells: Sequence[Cell]) -> str:
    """Return the cells as main() reads them."""
    return json.dumps([asdict(cell) for cell in cells])


if __name__ == "__main__":
    main(*sys.argv[1:])
