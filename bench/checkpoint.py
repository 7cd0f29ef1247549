"""How long a save keeps training waiting, against torch's dcp.save and dcp.async_save: `python bench/checkpoint.py`.

One process, one model, one optimizer; the three ways take turns within the same run, on the same disk, so that a busy
machine slows all of them. Between two saves as many steps are trained as the save takes to be written, and not counted.

Times are from the call until training may go on: for ours the copy into kept memory, for dcp.save all of the writing,
for dcp.async_save (a thread, and torch's default stager) what its call takes until it returns. Only ours is hashed,
verified and committed by a rename.
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
from distgpt.checkpoint.reader import training_tensors
from distgpt.config import resolve
from distgpt.corpus.shard_writer import Documents, write_dataset
from distgpt.corpus.shards import Dataset, open_dataset
from distgpt.corpus.tokenizer.simple import ByteTokenizer
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.runtime import this_rank
from distgpt.health.outliers import Guard
from distgpt.model.gpt import count_parameters
from distgpt.model.optim import build_optimizer
from distgpt.run.paths import RunPaths
from distgpt.run.session import Run

# What the share of training time is given for: a save every ten minutes.
INTERVAL_SECONDS = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="seed", help="the model (default: seed, 10.8 M parameters)")
    parser.add_argument("--saves", type=int, default=7, help="saves of each way")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        compare(Path(place), arguments.preset, arguments.saves)


def compare(place: Path, preset: str, saves: int) -> None:
    config = resolve([preset, f"--run.dir={place / 'run'}", "--train.micro_batch=1", "--checkpoint.keep=1"], {})
    dataset, runtime = small_dataset(place / "data"), this_rank()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = build_model(
        config,
        runtime,
        strategy="single",
        vocab_size=dataset.vocab_size,
        eot_id=None,
        micro_batch=1,
        dtype=torch.float32,
    )
    optimizer = build_optimizer(model, config.optim, "cpu")
    run = Run(RunPaths(place / "run"), 0)
    run.own()
    checkpointer = Checkpointer(
        run,
        config=config,
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        guard=Guard(config.health),
        runtime=runtime,
        say=print,
    )

    def train() -> None:
        x_BT = torch.randint(0, dataset.vocab_size, (1, config.model.block_size))
        model(x_BT, x_BT).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours(step: int) -> Callable[[], object]:
        checkpointer.save(step, val_loss=None)
        return checkpointer.wait

    def synchronous(step: int) -> Callable[[], object]:
        dcp.save(training_tensors(model, optimizer), checkpoint_id=place / f"sync-{step}")
        return lambda: shutil.rmtree(place / f"sync-{step}")

    def asynchronous(step: int) -> Callable[[], object]:
        future = dcp.async_save(training_tensors(model, optimizer), checkpoint_id=place / f"async-{step}")
        assert isinstance(future, Future)

        def finish() -> None:
            future.result()
            shutil.rmtree(place / f"async-{step}")

        return finish

    ways = {"ours": ours, "dcp.save": synchronous, "dcp.async_save": asynchronous}
    stalls: dict[str, list[float]] = {name: [] for name in ways}
    wholes: dict[str, list[float]] = {name: [] for name in ways}
    train()
    for step in range(1, saves + 2):  # the first of each warms up
        for name, save in ways.items():
            train()
            started = time.perf_counter()
            finish = save(step)
            stalls[name].append(time.perf_counter() - started)
            finish()
            wholes[name].append(time.perf_counter() - started)
    dist.destroy_process_group()
    report(count_parameters(config.model, dataset.vocab_size), stalls, wholes)


def report(parameters: int, stalls: dict[str, list[float]], wholes: dict[str, list[float]]) -> None:
    size, saves = 12 * parameters / 2**20, len(stalls["ours"]) - 1
    print(f"{parameters:,} parameters, {size:.0f} MiB a checkpoint; medians of {saves}")
    print("| | training waits | ratio to ours | until it is on the disk | share of ten minutes |")
    print("|---|---|---|---|---|")
    median = {name: statistics.median(times[1:]) for name, times in stalls.items()}
    for name, stall in median.items():
        ratio, whole = stall / median["ours"], statistics.median(wholes[name][1:])
        share = stall / INTERVAL_SECONDS
        print(f"| {name} | {stall * 1e3:.0f} ms | {ratio:.1f} | {whole * 1e3:.0f} ms | {share:.4%} |")
    print(f"ours stays below 1% of training time for any interval over {100 * median['ours']:.1f} s")


def small_dataset(directory: Path) -> Dataset:
    """A byte-level one, since a checkpoint holds its tokenizer and fingerprint."""
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
