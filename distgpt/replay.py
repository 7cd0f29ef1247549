"""Compute a step of a run again and find where it stops being finite: `python -m distgpt.replay RUN --step S`.

A checkpoint before S, or initial weights -> the steps in between -> step S under a probe -> what it found.

One process sees the sequences and draws the dropout masks of any number of ranks, so it computes the same to rounding.
It leaves the run directory as it is.
"""

import argparse

from distgpt.checkpoint.choice import NEWEST, add_option
from distgpt.cli import Parser, enter, main_guard
from distgpt.files import user_path


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.replay",
        description="Compute a step of a run again, and name the first layer where it is not finite.",
    )
    parser.add_argument(
        "run", type=user_path, metavar="RUN", help="run directory, or the checkpoint of it to set out from"
    )
    add_option(parser, default="the newest good one before S")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the step, as metrics.jsonl counts them")
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared data (default: the run's own)")
    return parser.parse_args()


if __name__ == "__main__":
    # Before torch, which takes seconds to import: --help and a mistyped flag answer at once.
    enter()
    ARGUMENTS = main_guard(parse_arguments)

from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from distgpt.checkpoint.choice import choose, is_checkpoint, newest_good
from distgpt.checkpoint.manifest import STATE, RunState, committed, listed, read_state, step_of
from distgpt.checkpoint.reader import load_for_training, require_model
from distgpt.config import Config, from_dict, resolve
from distgpt.corpus.loader import Loader
from distgpt.corpus.shards import Dataset
from distgpt.distributed.collectives import grad_norm_of
from distgpt.distributed.device import compute_dtype
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import micro_batch_size
from distgpt.distributed.process_group import joined
from distgpt.distributed.runtime import Runtime, this_rank
from distgpt.errors import DataError, UsageError
from distgpt.health.outliers import Guard
from distgpt.model.optim import build_optimizer, lr_at, set_lr
from distgpt.model.probe import Finding, Probe
from distgpt.run.paths import RunPaths
from distgpt.telemetry.metrics import read_metrics
from distgpt.training.startup import open_data_of_run
from distgpt.training.step import accumulate_gradients, update


@dataclass(frozen=True)
class Start:
    """Where a replay sets out: a checkpoint and what it knows, or neither for the initial weights."""

    config: Config
    checkpoint: Path | None = None
    state: RunState | None = None

    @property
    def step(self) -> int:
        """Steps that were taken before."""
        return self.state.step if self.state else 0


def main(arguments: argparse.Namespace) -> None:
    """Replay in one process and print what was found."""
    path, step = Path(arguments.run), arguments.step
    run = RunPaths(path.resolve().parents[1] if is_checkpoint(path) else path)
    chosen = is_checkpoint(path) or arguments.checkpoint != NEWEST
    runtime = this_rank()
    if runtime.distributed:
        raise UsageError("replay is one process: start it without torchrun")
    start = start_from(choose(path, arguments.checkpoint), run, step) if chosen else start_before(run, step)
    if start.config.parallel.strategy == "diloco":
        raise UsageError("the replicas of diloco learn apart, which one process cannot replay")
    if not 1 <= step <= start.config.train.steps:
        raise UsageError(f"--step is {step}: the run has steps 1 to {start.config.train.steps}")
    dataset = data_of(start, arguments.data)
    with joined(runtime, timeout=0):
        replay(start, step, runtime, dataset)
    print(f"logged    {logged(run, step)}")


def start_before(run: RunPaths, step: int) -> Start:
    """The newest good checkpoint before `step`, or else the start of the run. Raises DataError if there is no run."""
    checkpoint, broken = newest_good(run.checkpoints, before=step)
    if broken:
        print(f"skipped {listed(broken)}")
    state = read_state(checkpoint) if checkpoint is not None else None
    return Start(config_of(run, step, state), checkpoint, state)


def start_from(checkpoint: Path, run: RunPaths, step: int) -> Start:
    """This checkpoint, which a person chose. Raises UsageError if it is not from before `step`."""
    state = read_state(checkpoint)
    if state.step >= step:
        raise UsageError(f"{checkpoint} is of step {state.step}: a replay of step {step} sets out before it")
    return Start(config_of(run, step, state), checkpoint, state)


def config_of(run: RunPaths, step: int, before: RunState | None) -> Config:
    """That of the attempt that took this step, as far as is known: it made the next checkpoint, or it was the last.

    `before`: what the checkpoint to set out from knows. Raises DataError if there is no run.
    """
    for checkpoint in reversed(committed(run.checkpoints)):
        if step_of(checkpoint) >= step:
            with suppress(DataError):
                return as_trained(read_state(checkpoint))
    if run.config.is_file():
        try:
            return resolve([str(run.config)], {})
        except UsageError as error:
            if before is None:
                raise
            print(f"skipped {error}")
    if before is None:
        raise DataError(f"{run.root} holds no run: neither a checkpoint before step {step} nor {run.config.name}")
    return as_trained(before)


def as_trained(state: RunState) -> Config:
    """The config of a checkpoint with the micro-batch that was in use, on which the dropout masks depend."""
    config = from_dict(state.config, source=STATE)
    return replace(config, train=replace(config.train, micro_batch=state.micro_batch or config.train.micro_batch))


def data_of(start: Start, directory: str | None) -> Dataset:
    """The data that the run was trained on, now in `directory` if that is given. Raises DataError if it is not."""
    fingerprint = start.state.data_fingerprint if start.state else None
    return open_data_of_run(start.config.data.path, directory, fingerprint=fingerprint)


def replay(start: Start, target: int, runtime: Runtime, dataset: Dataset) -> None:
    """Take the steps up to `target` as distgpt.train does, probe that one, print what there is to say."""
    config, dtype = start.config, compute_dtype(start.config.train.dtype, runtime.device)
    micro_batch = config.train.micro_batch or (start.state.micro_batch if start.state else 0)
    micro_batch = micro_batch or micro_batch_size(config, runtime)
    if start.checkpoint is not None:
        require_model(start.checkpoint, config, dataset.vocab_size)
    model = build_model(
        config,
        runtime,
        strategy="single",
        vocab_size=dataset.vocab_size,
        eot_id=dataset.eot_id,
        micro_batch=micro_batch,
        dtype=dtype,
    )
    optimizer = build_optimizer(model, config.optim, runtime.device.type)
    guard = Guard(config.health)
    if start.checkpoint is not None and start.state is not None:
        load_for_training(start.checkpoint, model, optimizer)
        guard.restore(start.state.guard)
    origin = start.checkpoint.name if start.checkpoint else "the initial weights"
    print(f"from      {origin}, {str(dtype).removeprefix('torch.')} on {runtime.device.type}", flush=True)

    with closing(
        Loader(
            dataset.train,
            block_size=config.model.block_size,
            global_batch=config.train.global_batch,
            micro_batch=micro_batch,
            rank=0,
            world_size=1,
            seed=config.run.seed,
            device=runtime.device,
            start_step=start.step,
        )
    ) as loader:
        for step in tqdm(range(start.step + 1, target), disable=None, leave=False):
            set_lr(optimizer, lr_at(step - 1, config.optim, config.train.steps))
            loss = accumulate_gradients(model, loader.next_step(), step, config, runtime, dtype)
            norm = grad_norm_of(model)
            verdict = guard.judge(loss=loss.item(), grad_norm=norm.item())
            if verdict.action == "stop":
                raise DataError(f"{verdict.objection} at step {step} already: replay that one with --step={step}")
            if verdict.action == "update":
                update(model, optimizer, norm, clip=config.optim.grad_clip)
            optimizer.zero_grad()
        print(f"weights   {weights_in_words(model)}")
        probe = Probe()
        with probe.watching(model), torch.compiler.set_stance("force_eager"):
            loss = accumulate_gradients(model, loader.next_step(), target, config, runtime, dtype)
        print(f"step {target:<4} {in_words(probe.finding)}")
        if probe.finding is not None:
            print(f"samples   {samples_of(loader, target, probe.finding.call, micro_batch)}")
    print(f"replayed  loss {loss.item():.7g} | gradient norm {grad_norm_of(model).item():.7g}")


def weights_in_words(model: nn.Module) -> str:
    """Which weights are no numbers."""
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if not bad:
        return "all finite"
    return f"not finite in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")


def in_words(finding: Finding | None) -> str:
    """What the probe found, or that it found nothing."""
    if finding is None:
        return "all finite, forward and backward"
    module = finding.module or "the model itself, around its layers"
    return f"not finite, first in the {finding.phase} pass of {module}: {finding.tensor}"


def samples_of(loader: Loader, step: int, index: int, micro_batch: int) -> str:
    """Which sequences the micro-batch of this index holds, and where in the corpus they stand."""
    rows = slice(index * micro_batch, (index + 1) * micro_batch)
    numbers = loader.sample_numbers(step - 1)
    shards, offsets = (values[rows].tolist() for values in loader.places(step - 1))
    return (
        f"{numbers[rows][0]} to {numbers[rows][-1]}, micro-batch {index + 1} of {len(numbers) // micro_batch}, "
        f"as (shard, token offset): {list(zip(shards, offsets, strict=True))}"
    )


def logged(run: RunPaths, step: int) -> str:
    """What metrics.jsonl says of the step; null stands for what was not finite."""
    lines = read_metrics(run.metrics) if run.metrics.exists() else []
    line: dict[str, Any] = next((line for line in lines if line["step"] == step and "loss" in line), {})
    if not line:
        return f"nothing of step {step}"
    figures = ("not finite" if line[name] is None else f"{line[name]:.7g}" for name in ("loss", "grad_norm"))
    skipped = " | update skipped" if line.get("skipped") else ""
    return "loss {} | gradient norm {}".format(*figures) + skipped


if __name__ == "__main__":
    main_guard(lambda: main(ARGUMENTS))
