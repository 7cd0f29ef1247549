"""Benchmark of saves: distgpt, torch's dcp.save and dcp.async_save.

    python bench/checkpoint.py [--preset seed] [--saves 5]

One process, one model, one optimizer. The three methods take turns within one run, on the same disk, so that a busy
machine slows all of them. Each method saves twice in a turn.

While training goes on: "waits" is the time of the call and of the wait for the copy, which distgpt makes beside the
gradients of the next step. "Steps while it writes" compares their time with that of a step before each save.

While nothing else runs: "on the disk" is the time from the call until the checkpoint is written, and with distgpt
hashed and committed. No older one is removed meanwhile: then distgpt would read the new one back first.
"""

import argparse
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
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


@dataclass
class Method:
    """A way to save, and the seconds that it took."""

    save: Callable[[Path], Callable[[], bool]]  # returns a function that tells whether the checkpoint is written
    waits: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    slower: list[float] = field(default_factory=list)  # a step beside a save, as a multiple of one without


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="seed", help="model to save (default: seed, 10.8 M parameters)")
    parser.add_argument("--saves", type=int, default=5, help="turns (default: 5)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        compare(Path(directory), arguments.preset, arguments.saves)


def compare(directory: Path, preset: str, saves: int) -> None:
    flags = ("--train.micro_batch=1", "--train.dtype=float32", "--checkpoint.keep=1000")
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

    def train() -> tuple[float, float]:
        """Return the seconds of a step, and those of them that it waited for the copy of a save."""
        started = time.perf_counter()
        x_BT = torch.randint(0, dataset.vocab_size, (1, config.model.block_size))
        model(x_BT, x_BT).mean().backward()
        ready = time.perf_counter()
        checkpointer.wait_until_staged()
        waited = time.perf_counter() - ready
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started, waited

    steps = itertools.count(1)

    def distgpt(_: Path) -> Callable[[], bool]:
        checkpointer.save(next(steps), val_loss=None)

        def done() -> bool:
            checkpointer.poll()
            return not checkpointer.writing

        return done

    def synchronous(target: Path) -> Callable[[], bool]:
        dcp.save(training.tensors(), checkpoint_id=target)
        return lambda: True

    def asynchronous(target: Path) -> Callable[[], bool]:
        future = dcp.async_save(training.tensors(), checkpoint_id=target)
        assert isinstance(future, Future)
        return future.done

    def remove() -> None:
        for written in (session.paths.checkpoints, directory / "dcp"):
            shutil.rmtree(written, ignore_errors=True)

    methods = {"dcp.save": Method(synchronous), "dcp.async_save": Method(asynchronous), "distgpt": Method(distgpt)}
    train()
    for _ in range(saves + 1):  # the first turn warms up
        for method in methods.values():
            take_turn(method, directory / "dcp", train, remove)
    dist.destroy_process_group()
    report(count_parameters(config.model, dataset.vocab_size), methods)


def take_turn(
    method: Method, target: Path, train: Callable[[], tuple[float, float]], remove: Callable[[], None]
) -> None:
    """Save twice: while nothing else runs, then beside training."""
    started = time.perf_counter()
    done = method.save(target)
    while not done():
        time.sleep(0.001)
    method.totals.append(time.perf_counter() - started)
    remove()
    undisturbed, _ = train()
    started = time.perf_counter()
    done = method.save(target)
    called = time.perf_counter() - started
    beside = list[tuple[float, float]]()
    while not done() or not beside:
        beside.append(train())
    method.waits.append(called + sum(waited for _, waited in beside))
    method.slower.append(statistics.mean(seconds for seconds, _ in beside) / undisturbed)
    remove()


def report(parameters: int, methods: dict[str, Method]) -> None:
    saves = len(methods["distgpt"].totals) - 1
    print(f"{parameters:,} parameters, {12 * parameters / 2**20:.0f} MiB per checkpoint; medians of {saves}")
    print("| | training waits | of dcp.save's | on the disk | of dcp.save's | steps while it writes |")
    print("|---|---|---|---|---|---|")
    base = methods["dcp.save"]
    for name, method in methods.items():
        wait, total, slower = (statistics.median(x[1:]) for x in (method.waits, method.totals, method.slower))
        share, ratio = (
            statistics.median(mine / theirs for mine, theirs in zip(ours[1:], other[1:], strict=True))
            for ours, other in ((method.waits, base.waits), (method.totals, base.totals))
        )
        beside = "none" if method is base else f"{slower:.2f}x"
        print(f"| {name} | {wait * 1e3:.0f} ms | {share:.1%} | {total * 1e3:.0f} ms | {ratio:.2f} | {beside} |")


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
