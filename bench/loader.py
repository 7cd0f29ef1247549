"""Benchmark of the loader and nanoGPT's get_batch, in the same run: python bench/loader.py

nanoGPT's get_batch opens the memory map again for each batch, draws random offsets, and stacks one int64 copy per
sequence for the inputs and another for the targets. Both read the same file from the page cache and return int64
tensors on the CPU. They take turns; the figures are medians over the rounds, in microseconds per batch:

  waiting   time that a training loop waits for a batch, with 10 ms of compute between two batches
  CPU time  of all threads, for batches without compute between them; training on a CPU loses this time
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from distgpt.corpus.loader import Loader
from distgpt.corpus.shards import Split
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import this_rank

TOKENS = 100_000_000
SHAPES = ((12, 1024), (32, 1024), (64, 256))
ROUNDS, BATCHES = 9, 60
COMPUTE_SECONDS = 0.01

Batch = Callable[[], object]


def main() -> None:
    # Both use the threads and the allocator of training.
    with process_group(this_rank(), timeout=60), tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "train-00000.bin"
        np.random.default_rng(0).integers(0, 50_257, TOKENS, dtype=np.uint16).tofile(path)
        split = Split("train", (np.memmap(path, dtype=np.uint16, mode="r"),))
        print(f"{'batch':>10}  {'':10}{'nanoGPT':>9}{'distgpt':>9}{'ratio':>8}")
        for rows, block_size in SHAPES:
            compare(path, split, rows, block_size)


def compare(path: Path, split: Split, rows: int, block_size: int) -> None:
    loader = Loader(
        split,
        block_size=block_size,
        global_batch=rows,
        micro_batch=rows,
        rank=0,
        world_size=1,
        seed=0,
        device=torch.device("cpu"),
        start_step=0,
    )
    with closing(loader):
        loaders: tuple[Batch, Batch] = (lambda: nanogpt_batch(path, rows, block_size), loader.next_step)
        for name, measure in (("waiting", waiting), ("CPU time", cpu_time)):
            rounds = [[measure(load) * 1e6 for load in loaders] for _ in range(ROUNDS)]
            nanogpt, distgpt = (statistics.median(times) for times in zip(*rounds, strict=True))
            ratio = statistics.median(theirs / ours for theirs, ours in rounds)
            print(f"{rows:>4} x {block_size:<4} {name:<10}{nanogpt:>9.0f}{distgpt:>9.0f}{ratio:>7.1f}x")


def waiting(batch: Batch) -> float:
    """Return the seconds that a call waits for its batch. The compute before each call does not hold the GIL."""
    waited = 0.0
    for _ in range(BATCHES):
        compute()
        started = time.perf_counter()
        batch()
        waited += time.perf_counter() - started
    return waited / BATCHES


def cpu_time(batch: Batch) -> float:
    """Return the CPU seconds per batch, over all threads."""
    started = time.process_time()
    for _ in range(10 * BATCHES):
        batch()
    return (time.process_time() - started) / (10 * BATCHES)


def compute() -> None:
    matrix = torch.ones(256, 256)
    end = time.perf_counter() + COMPUTE_SECONDS
    while time.perf_counter() < end:
        torch.mm(matrix, matrix)


def nanogpt_batch(path: Path, rows: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(path, dtype=np.uint16, mode="r")
    offsets = torch.randint(len(data) - block_size, (rows,))
    inputs = [torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in offsets]
    targets = [torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in offsets]
    return torch.stack(inputs), torch.stack(targets)


if __name__ == "__main__":
    main()
