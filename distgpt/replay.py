"""Compute a step of a run again and find the first layer that is not finite: `python -m distgpt.replay RUN --step S`.

Load a checkpoint before S, or the initial weights -> take the steps before S -> run step S under a probe -> report.

One process sees the same sequences and dropout masks as any number of ranks, so its results differ only by rounding.
The run directory is not changed.
"""

from distgpt import cli

if __name__ == "__main__":
    cli.run("replay")

import argparse
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from distgpt.checkpoint.choice import NEWEST, choose, is_checkpoint, newest_good
from distgpt.checkpoint.compatibility import as_trained, with_choices_of
from distgpt.checkpoint.manifest import RunState, committed, describe_damage, read_state, step_of
from distgpt.checkpoint.reader import TrainingState, require_model
from distgpt.config import Config, resolve
from distgpt.corpus.loader import Loader
from distgpt.corpus.shards import Dataset
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import Runtime, only_rank
from distgpt.errors import DataError, UsageError
from distgpt.health.outliers import OutlierFilter
from distgpt.model.optim import build_optimizer, lr_at, set_lr
from distgpt.model.probe import NonFiniteTensor, Probe
from distgpt.run.paths import RunPaths
from distgpt.telemetry.step_lines import read_lines
from distgpt.training.startup import open_data_of_run, training_batches
from distgpt.training.step import accumulate_gradients, apply_update
from distgpt.weights.initial import load_initial_weights


@dataclass(frozen=True)
class Start:
    """The start of a replay: a checkpoint and its state, both None for the initial weights."""

    config: Config
    checkpoint: Path | None = None
    state: RunState | None = None

    @property
    def step(self) -> int:
        """The number of steps taken before the start."""
        return self.state.step if self.state else 0


def main(arguments: argparse.Namespace) -> None:
    """Replay the step in one process, and print where it is not finite."""
    path, step = Path(arguments.run), arguments.step
    run = RunPaths(path.resolve().parents[1] if is_checkpoint(path) else path)
    is_chosen = is_checkpoint(path) or arguments.checkpoint != NEWEST
    runtime = only_rank("replay", arguments.device)
    start = start_from(choose(path, arguments.checkpoint), run, step) if is_chosen else start_before(run, step)
    if start.config.parallel.strategy == "diloco":
        raise UsageError("the replicas of diloco train independently, which one process cannot replay")
    if not 1 <= step <= start.config.train.steps:
        raise UsageError(f"--step is {step}: the run has steps 1 to {start.config.train.steps}")
    dataset = open_data(start, arguments.data)
    with process_group(runtime, timeout=0):
        replay(start, step, runtime, dataset)
    print(f"logged    {describe_logged(run, step)}")


def start_before(run: RunPaths, step: int) -> Start:
    """Start from the newest good checkpoint before `step`, or else from the initial weights. Raises DataError."""
    earlier = (checkpoint for checkpoint in committed(run.checkpoints) if step_of(checkpoint) < step)
    checkpoint, damaged = newest_good(earlier)
    if damaged:
        print(f"skipped {describe_damage(damaged)}")
    state = read_state(checkpoint) if checkpoint is not None else None
    return Start(config_of(run, step, state), checkpoint, state)


def start_from(checkpoint: Path, run: RunPaths, step: int) -> Start:
    """Start from a checkpoint that the user chose. Raises UsageError if it is not from before `step`."""
    state = read_state(checkpoint)
    if state.step >= step:
        raise UsageError(f"{checkpoint} is of step {state.step}: to replay step {step}, choose one before it")
    return Start(config_of(run, step, state), checkpoint, state)


def config_of(run: RunPaths, step: int, start_state: RunState | None) -> Config:
    """Find the config of the attempt that took this step: of the next checkpoint or, without one, of the last attempt.

    `start_state`: the state of the checkpoint to start from. Raises DataError if there is no run.
    """
    for checkpoint in reversed(committed(run.checkpoints)):
        if step_of(checkpoint) >= step:
            with suppress(DataError):
                return as_trained(read_state(checkpoint))
    if run.config.is_file():
        try:
            config = resolve([str(run.config)], {})
            return with_choices_of(start_state, config) if start_state else config
        except UsageError as error:
            if start_state is None:
                raise
            print(f"skipped {error}")
    if start_state is None:
        raise DataError(f"{run.root} holds no run: neither a checkpoint before step {step} nor {run.config.name}")
    return as_trained(start_state)


def open_data(start: Start, directory: str | None) -> Dataset:
    """Open the data of the run, from `directory` if given. Raises DataError if the data are not those of the run."""
    fingerprint = start.state.data_fingerprint if start.state else None
    return open_data_of_run(start.config.data.path, directory, fingerprint=fingerprint)


def replay(start: Start, target: int, runtime: Runtime, dataset: Dataset) -> None:
    """Take the steps before `target` as distgpt.train does, run step `target` under a probe, print what it found."""
    config, seed = start.config, start.config.run.seed
    plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
    if start.checkpoint is not None:
        require_model(start.checkpoint, config, dataset.vocab_size)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=dataset.eot_id)
    gradients = gradients_of(model, plan)
    optimizer = build_optimizer(model, config.optim, runtime.device.type, plan.dtype, exact=plan.exact)
    outliers = OutlierFilter(config.health)
    if start.checkpoint is not None:
        TrainingState(model, optimizer, outliers).load(start.checkpoint)
    elif config.init.from_:
        load_initial_weights(config, plan, dataset, model, None)
    origin = start.checkpoint.name if start.checkpoint else "the initial weights"
    print(f"from      {origin}, {plan.dtype_name} on {runtime.device.type}", flush=True)

    with closing(training_batches(config, plan, dataset, start_step=start.step)) as batches:
        for step in tqdm(range(start.step + 1, target), disable=None, leave=False):
            set_lr(optimizer, lr_at(step - 1, config.optim, config.train.steps))
            losses = accumulate_gradients(gradients, batches.next_step(), step, seed=seed)
            norm, figures = gradients.finish(losses, stop=False)
            decision = outliers.check(loss=figures[0].item(), grad_norm=figures[1].item())
            if decision.action == "stop":
                raise DataError(f"{decision.reason} at step {step} already: replay that step with --step={step}")
            if decision.action == "update":
                apply_update(optimizer, norm, clip=config.optim.grad_clip)
            optimizer.zero_grad()
        print(f"weights   {describe_weights(model)}")
        probe = Probe()
        with probe.watching(model), torch.compiler.set_stance("force_eager"):
            losses = accumulate_gradients(gradients, batches.next_step(), target, seed=seed)
            norm, figures = gradients.finish(losses, stop=False)
        print(f"step {target:<4} {describe_finding(probe.finding)}")
        if probe.finding is not None:
            print(f"samples   {describe_samples(batches, target, probe.finding.call, plan.micro_batch)}")
    print(f"replayed  loss {figures[0].item():.7g} | gradient norm {norm.item():.7g}")


def describe_weights(model: nn.Module) -> str:
    """Name the weights that are not finite."""
    bad = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if not bad:
        return "all finite"
    return f"not finite in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")


def describe_finding(finding: NonFiniteTensor | None) -> str:
    """Say where the probe first met a value that is not finite, if anywhere."""
    if finding is None:
        return "all finite, forward and backward"
    module = finding.module or "the model itself, around its layers"
    return f"not finite, first in the {finding.phase} pass of {module}: {finding.tensor}"


def describe_samples(batches: Loader, step: int, index: int, micro_batch: int) -> str:
    """List the sequences of micro-batch `index` of a step, and their places in the corpus."""
    rows = slice(index * micro_batch, (index + 1) * micro_batch)
    numbers = batches.sample_numbers(step - 1)
    shards, offsets = (values[rows].tolist() for values in batches.places(step - 1))
    return (
        f"{numbers[rows][0]} to {numbers[rows][-1]}, micro-batch {index + 1} of {len(numbers) // micro_batch}, "
        f"as (shard, token offset): {list(zip(shards, offsets, strict=True))}"
    )


def describe_logged(run: RunPaths, step: int) -> str:
    """Quote the figures of a step from metrics.jsonl, where null stands for a value that was not finite."""
    lines = read_lines(run.metrics) if run.metrics.exists() else []
    line: dict[str, Any] = next((line for line in lines if line["step"] == step and "loss" in line), {})
    if not line:
        return f"nothing of step {step}"
    figures = ("not finite" if line[name] is None else f"{line[name]:.7g}" for name in ("loss", "grad_norm"))
    skipped = " | update skipped" if line.get("skipped") else ""
    return "loss {} | gradient norm {}".format(*figures) + skipped
