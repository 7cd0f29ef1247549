"""The cells of the equivalence matrix, and the program that trains them: a process for each rank, cell after cell.

Usage, in the process of rank $RANK: `python -m tests.end_to_end.equivalence DATASET STEPS CELLS DIRECTORY`. CELLS is a
JSON file with the fields of each cell. As many ranks as a cell has train it; rank 0 writes its figures to DIRECTORY.
"""

import gc
import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from distgpt.config import resolve
from distgpt.corpus.shard_writer import Documents, write_dataset
from distgpt.corpus.shards import Dataset, open_dataset
from distgpt.corpus.tokenizer.simple import CharTokenizer
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import build_model, unwrap_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.process_group import LOOPBACK, init_process_group
from distgpt.distributed.runtime import Runtime
from distgpt.model.optim import build_optimizer, lr_at, set_lr
from distgpt.training.figures import FigureReader, not_finite
from distgpt.training.startup import training_batches
from distgpt.training.step import accumulate_gradients, apply_update
from distgpt.units import ranks_text

TIMEOUT = 120.0
# No number of rows divides by 3 or 4, and 65 not by 2 either, so that shards are uneven.
MODEL = (
    *("--model.n_layer=1", "--model.n_embd=10", "--model.n_head=2", "--model.n_kv_head=1", "--model.mlp_hidden=22"),
    *("--model.block_size=13", "--model.vocab_multiple=1", "--model.document_mask"),
    *("--model.dropout=0.2", "--model.embedding_dropout"),
)
TRAINING = ("--train.global_batch=48", "--optim.lr=1e-3", "--optim.grad_clip=1.0")

GLOBAL_BATCH, EXACT_MICRO_BATCH = 48, 2
# Ranks that share a replica with hsdp: all, but for two replicas of four ranks, and of eight.
SHARD = {1: 0, 2: 2, 3: 3, 4: 2, 8: 4}

Curve = list[tuple[float, float]]  # loss and gradient norm of each step
Deviation = tuple[float, float]  # of losses, and of gradient norms


class Process(Protocol):
    """A process that was started."""

    def wait(self) -> int:
        """Wait for its end and return its exit code."""


@dataclass(frozen=True)
class Outcome:
    """What a cell learned: its curve, and the SHA-256 of its weights at the end."""

    curve: Curve
    weights: str


@dataclass(frozen=True)
class Cell:
    """One way to train the same steps."""

    ranks: int
    strategy: str
    accumulation: int
    recompute: bool
    dtype: str
    optimizer: str
    exact: bool = False

    def arguments(self) -> list[str]:
        """Return the options of distgpt.train."""
        return [
            *(*MODEL, *TRAINING, f"--train.micro_batch={GLOBAL_BATCH // (self.ranks * self.accumulation)}"),
            f"--parallel.strategy={'auto' if self.strategy == 'single' else self.strategy}",
            f"--parallel.shard={SHARD[self.ranks]}",
            f"--parallel.activation_checkpoint={str(self.recompute).lower()}",
            f"--train.dtype={self.dtype}",
            f"--optim.name={self.optimizer}",
            f"--parallel.reduction={'exact' if self.exact else 'default'}",
        ]

    def reference(self) -> "Cell":
        """Return the cell that this one must equal: one process and, unless sums are exact, one micro-batch a step."""
        accumulation = GLOBAL_BATCH // EXACT_MICRO_BATCH if self.exact else 1
        return replace(self, ranks=1, strategy="single", accumulation=accumulation, recompute=False)


LAYOUTS = [(1, "single"), *itertools.product((2, 3, 4), ("ddp", "fsdp", "hsdp"))]
DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
ALL = [
    Cell(ranks, strategy, accumulation, recompute, dtype, optimizer)
    for accumulation, recompute, dtype, optimizer in itertools.product((1, 2, 4), (False, True), DTYPES, OPTIMIZERS)
    for ranks, strategy in LAYOUTS
]
# With exact sums all have the same micro-batch.
EXACT = [
    Cell(ranks, strategy, GLOBAL_BATCH // (ranks * EXACT_MICRO_BATCH), recompute, dtype, optimizer, exact=True)
    for recompute, dtype, optimizer in itertools.product((False, True), DTYPES, OPTIMIZERS)
    for ranks, strategy in [*LAYOUTS, *itertools.product((8,), ("ddp", "fsdp", "hsdp"))]
]
EXACT_CORNERS = [
    Cell(2, "ddp", 12, False, "bfloat16", "muon", exact=True),
    Cell(3, "fsdp", 8, True, "bfloat16", "muon", exact=True),
    Cell(4, "hsdp", 6, False, "bfloat16", "muon", exact=True),
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


def train(cell: Cell, runtime: Runtime, dataset: Dataset, steps: int) -> Outcome:
    """Train a cell from its start, as distgpt.train does."""
    config = resolve(cell.arguments(), {})
    plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
    assert (plan.strategy, plan.accumulation) == (cell.strategy, cell.accumulation)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=dataset.eot_id)
    gradients = gradients_of(model, plan)
    optimizer = build_optimizer(model, config.optim, runtime.device.type, plan.dtype, exact=plan.exact)
    reader, curve = FigureReader(runtime, at_once=True), []
    with closing(training_batches(config, plan, dataset, start_step=0)) as batches:
        for step in range(1, steps + 1):
            lr = set_lr(optimizer, lr_at(step - 1, config.optim, steps))
            losses = accumulate_gradients(gradients, batches.next_step(), step, seed=config.run.seed)
            norm, figures = gradients.finish(losses, stop=False)
            reader.add(step, figures, lr=lr)
            apply_update(optimizer, norm, clip=config.optim.grad_clip, skip=not_finite(figures))
            optimizer.zero_grad()
            curve += [(read.loss, read.grad_norm) for read in reader.take(now=True)]
    return Outcome(curve, sha256_of_weights(model))


def sha256_of_weights(model: nn.Module) -> str:
    """Return the SHA-256 of all weights, whole. All ranks call it."""
    digest = hashlib.sha256()
    for parameter in unwrap_model(model).parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        digest.update(whole.detach().numpy().tobytes())
    return digest.hexdigest()


def train_all(cells: Sequence[Cell], rank: int, dataset: Dataset, steps: int, directory: Path) -> None:
    """Train those of the cells that this rank takes part in, in a process group for each number of ranks."""
    for ranks, group in itertools.groupby(enumerate(cells), key=lambda numbered: numbered[1].ranks):
        if rank >= ranks:
            continue
        runtime = Runtime(rank, rank, ranks, ranks, torch.device("cpu"))
        if runtime.distributed:
            init_process_group(runtime, dist.FileStore(str(directory / f"store-{ranks}"), ranks), TIMEOUT)
        for number, cell in group:
            outcome = train(cell, runtime, dataset, steps)
            if rank == 0:
                (directory / f"{number}.json").write_text(json.dumps(asdict(outcome)))
        if runtime.distributed:
            gc.collect()  # frees models that hooks tied into cycles
            dist.destroy_process_group()


def main(data: str, steps: str, cells: str, directory: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    read = [Cell(**fields) for fields in json.loads(Path(cells).read_text())]
    train_all(read, int(os.environ["RANK"]), open_dataset(Path(data)), int(steps), Path(directory))


def trained(
    cells: Sequence[Cell], steps: int, directory: Path, *, start: Callable[[Sequence[str], int, int], Process]
) -> dict[Cell, Outcome]:
    """Train the cells, one after the other, in as many processes as the largest has ranks.

    `start` starts a command as a rank, with a file descriptor for its output.
    """
    write_documents(directory / "data")
    (directory / "cells.json").write_text(json.dumps([asdict(cell) for cell in cells]))
    arguments = [str(directory / "data"), str(steps), str(directory / "cells.json"), str(directory)]
    command = [sys.executable, "-m", "tests.end_to_end.equivalence", *arguments]
    with tempfile.TemporaryFile("w+") as output:
        ranks = [start(command, rank, output.fileno()) for rank in range(max(cell.ranks for cell in cells))]
        codes = [rank.wait() for rank in ranks]
        output.seek(0)
        assert not any(codes), output.read()
    found = [json.loads((directory / f"{number}.json").read_text()) for number in range(len(cells))]
    assert {len(outcome["curve"]) for outcome in found} == {steps}
    return {cell: Outcome(**outcome) for cell, outcome in zip(cells, found, strict=True)}


def write_documents(directory: Path) -> None:
    """Write a dataset of short documents with 64 characters and the end-of-text token: a vocabulary of 65."""
    tokenizer = CharTokenizer(map(chr, range(32, 96)), end_of_text=True)
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.geometric(0.1, 20_000) - 1, 63).astype(np.uint16)
    tokens[draw.random(len(tokens)) < 1 / 8] = tokens[-1] = 64
    ends = np.flatnonzero(tokens == 64) + 1
    directory.mkdir()
    write_dataset(
        directory,
        [Documents(split, tokens, ends) for split in ("train", "val")],
        tokenizer=tokenizer,
        eot_id=64,
        shard_tokens=None,
        about={},
        advance=lambda written: None,
    )


def deviation(curve: Curve, reference: Curve) -> Deviation:
    """Return the largest relative deviation of the losses, and that of the gradient norms."""
    loss, norm = np.abs(np.array(curve) / np.array(reference) - 1).max(axis=0)
    return float(loss), float(norm)


def deviations(outcomes: Mapping[Cell, Outcome]) -> dict[Cell, Deviation]:
    """Return how far each cell is from the one that it must equal, those with exact sums left out."""
    cells = [cell for cell in outcomes if not cell.exact]
    return {cell: deviation(outcomes[cell].curve, outcomes[cell.reference()].curve) for cell in cells}


def table(found: Mapping[Cell, Deviation]) -> str:
    """Return the table of the page: the largest deviations of losses and of gradient norms in each group of cells."""
    columns = list(itertools.product(DTYPES, OPTIMIZERS))
    lines = [
        f"| | {' | '.join(f'{dtype}, {optimizer}' for dtype, optimizer in columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    for ranks, strategy in sorted({(cell.ranks, cell.strategy) for cell in found}):
        texts = []
        for column in columns:
            far = [
                far
                for cell, far in found.items()
                if (cell.ranks, cell.strategy, cell.dtype, cell.optimizer) == (ranks, strategy, *column)
            ]
            texts.append(" / ".join(f"{max(values):.1e}" for values in zip(*far, strict=True)))
        lines.append(f"| {strategy}, {ranks_text(ranks)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def exact_table(outcomes: Mapping[Cell, Outcome]) -> str:
    """Return the table of the cells with exact sums: the distinct hashes of weights in each group."""
    columns = list(itertools.product(DTYPES, OPTIMIZERS))
    exact = {cell: outcome for cell, outcome in outcomes.items() if cell.exact}
    lines = [
        f"| exact | {' | '.join(f'{dtype}, {optimizer}' for dtype, optimizer in columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    for ranks in sorted({cell.ranks for cell in exact}):
        texts = []
        for column in columns:
            hashes = {o.weights[:16] for c, o in exact.items() if (c.ranks, c.dtype, c.optimizer) == (ranks, *column)}
            texts.append(" ".join(f"`{weights}`" for weights in sorted(hashes)))
        lines.append(f"| {ranks_text(ranks)} | {' | '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
