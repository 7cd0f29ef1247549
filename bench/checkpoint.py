"""Benchmark of the time that training waits for a save: distgpt, torch's dcp.save and dcp.async_save.

    python bench/checkpoint.py [--preset seed] [--saves 7]

One process, one model, one optimizer. The three methods take turns within one run, on the same disk, so that a busy
machine slows all of them. Before each save one step is trained, which is not timed.

The time is taken from the call until training can continue: for distgpt the copy into memory that it keeps, for
dcp.save the whole write, for dcp.async_save (with a thread and torch's default stager) until the call returns. Only
distgpt's checkpoint is hashed, verified and committed by a rename.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.reader import TrainingState
from distgpt.config import resolve
from distgpt.corpus.shard_writer import Documents, write_dataset
from distgpt.corpus.shards import Dataset, open_dataset
from distgpt.corpus.tokenizer.simple import ByteTokenizer
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import this_rank
from distgpt.health.outliers import OutlierFilter
from distgpt.model.gpt import count_parameters
from distgpt.model.optim import build_optimizer
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession

# The last column is the share of training time for one save in this interval.
INTERVAL_SECONDS = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="seed", help="model to save (default: seed, 10.8 M parameters)")
    parser.add_argument("--saves", type=int, default=7, help="saves with each method (default: 7)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        compare(Path(directory), arguments.preset, arguments.saves)


def compare(directory: Path, preset: str, saves: int) -> None:
    flags = ("--train.micro_batch=1", "--train.dtype=float32", "--checkpoint.keep=1")
    config = resolve([preset, f"--run.dir={directory / 'run'}", *flags], {})
    dataset, runtime = small_dataset(directory / "data"), this_rank()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=None)
    optimizer = build_optimizer(model, config.optim, "cpu")
    session = RunSession(RunPaths(directory / "run"), 0)
    session.acquire()
    training = TrainingState(model, optimizer, OutlierFilter(config.health))
    checkpointer = Checkpointer(session, config, plan, dataset, training)

    def train() -> None:
        x_BT = torch.randint(0, dataset.vocab_size, (1, config.model.block_size))
        model(x_BT, x_BT).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def distgpt(step: int) -> Callable[[], object]:
        checkpointer.save(step, val_loss=None)
        return checkpointer.wait

    def synchronous(step: int) -> Callable[[], object]:
        dcp.save(training.tensors(), checkpoint_id=directory / f"sync-{step}")
        return lambda: shutil.rmtree(directory / f"sync-{step}")

    def asynchronous(step: int) -> Callable[[], object]:
        future = dcp.async_save(training.tensors(), checkpoint_id=directory / f"async-{step}")
        assert isinstance(future, Future)

        def finish() -> None:
            future.result()
            shutil.rmtree(directory / f"async-{step}")

        return finish

    methods = {"distgpt": distgpt, "dcp.save": synchronous, "dcp.async_save": asynchronous}
    stalls: dict[str, list[float]] = {name: [] for name in methods}
    totals: dict[str, list[float]] = {name: [] for name in methods}
    train()
    for step in range(1, saves + 2):  # the first save of each method warms up
        for name, save in methods.items():
            train()
            started = time.perf_counter()
            finish = save(step)
            stalls[name].append(time.perf_counter() - started)
            finish()
            totals[name].append(time.perf_counter() - started)
    dist.destroy_process_group()
    report(count_parameters(config.model, dataset.vocab_size), stalls, totals)


def report(parameters: int, stalls: dict[str, list[float]], totals: dict[str, list[float]]) -> None:
    size, saves = 12 * parameters / 2**20, len(stalls["distgpt"]) - 1
    print(f"{parameters:,} parameters, {size:.0f} MiB per checkpoint; medians of {saves}")
    print("| | training waits | ratio to distgpt | until it is on the disk | share of ten minutes |")
    print("|---|---|---|---|---|")
    median = {name: statistics.median(times[1:]) for name, times in stalls.items()}
    for name, stall in median.items():
        ratio, total = stall / median["distgpt"], statistics.median(totals[name][1:])
        share = stall / INTERVAL_SECONDS
        print(f"| {name} | {stall * 1e3:.0f} ms | {ratio:.1f} | {total * 1e3:.0f} ms | {share:.4%} |")
    print(f"distgpt's saves take less than 1% of training time if they are over {100 * median['distgpt']:.1f} s apart")


def small_dataset(directory: Path) -> Dataset:
    """Write a small byte-level dataset. A checkpoint contains its tokenizer and fingerprint."""
    directory.mkdir()
    tokens = np.arange(20_000, dtype=np.uint16) % 256
    parts = [Documents(split, tokens, np.array([tokens.size])) for split in ("train", "val")]
    write_dataset(
        directory,
        parts,
        tokenizer=ByteTokenizer(end_of_text=False),
        eot_id=None,
        shard_tokens=None,
        about={},
        advance=lambda written: None,
    )
    return open_dataset(directory)


if __name__ == "__main__":
    main()
