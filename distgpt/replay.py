"""Compute a step of a run again and find the first layer that is not finite: `python -m distgpt.replay RUN --step S`.

Load a checkpoint before S, or the initial weights -> take the steps before S -> run step S under a probe -> report.

Any number of ranks sees the same sequences and dropout masks, so results differ only by rounding from those of the run.
The run directory is not changed.
"""

from distgpt import cli

if __name__ == "__main__":
    cli.run("replay")

import argparse
import socket
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from distgpt.checkpoint.choice import NEWEST, choose, is_checkpoint
from distgpt.corpus.loader import Loader
from distgpt.corpus.shards import Dataset
from distgpt.distributed.collectives import broadcast_from_rank_zero, values_of_ranks
from distgpt.distributed.parallelize import unwrap_model
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import Runtime, this_rank
from distgpt.errors import UsageError
from distgpt.model.adamw import local_shard
from distgpt.model.probe import NonFiniteTensor, Probe
from distgpt.run.paths import RunPaths
from distgpt.telemetry.step_lines import read_lines
from distgpt.training.rerun import TIMEOUT_SECONDS, Rerun, Start, config_here, open_data, start_before, start_from


class Finding(NamedTuple):
    """The first value that is not finite on a rank, in words. Its order: the number of values checked before it."""

    order: int
    rank: int
    host: str
    text: str
    samples: str  # the sequences of its micro-batch


def main(arguments: argparse.Namespace) -> None:
    """Replay the step on all ranks, and print on rank 0 where it is not finite."""
    path, step = Path(arguments.run), arguments.step
    run = RunPaths(path.resolve().parents[1] if is_checkpoint(path) else path)
    runtime = this_rank(arguments.device)
    found: dict[str, Any] = {}
    if runtime.rank == 0:  # it verifies for all, which wait until it is done
        is_chosen = is_checkpoint(path) or arguments.checkpoint != NEWEST
        start = start_from(choose(path, arguments.checkpoint), run, step) if is_chosen else start_before(run, step)
        config_here(start, runtime)
        if not 1 <= step <= start.config.train.steps:
            raise UsageError(f"--step is {step}: the run has steps 1 to {start.config.train.steps}")
        open_data(start, arguments.data)
        found = start.to_json()
    with process_group(runtime, timeout=TIMEOUT_SECONDS):
        start = Start.from_json(**broadcast_from_rank_zero(found, runtime))
        replay(start, step, runtime, open_data(start, arguments.data))
    if runtime.rank == 0:
        print(f"logged    {describe_logged(run, step)}")


def replay(start: Start, target: int, runtime: Runtime, dataset: Dataset) -> None:
    """Take the steps before `target` as distgpt.train does, run step `target` under a probe, print what it found."""
    with closing(Rerun(start, runtime, dataset)) as rerun:
        origin = start.checkpoint.name if start.checkpoint else "the initial weights"
        lines = [f"from      {origin}, {rerun.plan.dtype_name} on {runtime.device.type}"]
        rerun.take_steps(target - 1)
        bad = values_of_ranks(bad_weights(rerun.model), runtime)
        lines.append(f"weights   {describe_weights(max(bad, key=len))}")
        probe, model = Probe(), unwrap_model(rerun.model)
        with probe.watching(model), torch.compiler.set_stance("force_eager"):
            figures, *_ = rerun.compute(target)
        of_rank = probe.finding and found_here(probe, probe.finding, rerun, target)
        finding = min((Finding(*found) for found in values_of_ranks(of_rank, runtime) if found), default=None)
    lines.append(f"step {target:<4} {finding.text if finding else 'all finite, forward and backward'}")
    if finding is not None and runtime.distributed:
        lines.append(f"met by    rank {finding.rank} on {finding.host}")
    lines += [f"samples   {finding.samples}"] if finding else []
    lines.append(f"replayed  loss {figures.loss:.7g} | gradient norm {figures.grad_norm:.7g}")
    if runtime.rank == 0:
        print("\n".join(lines), flush=True)


def found_here(probe: Probe, finding: NonFiniteTensor, rerun: Rerun, step: int) -> Finding:
    """Describe what the probe found on this rank."""
    samples = describe_samples(rerun.batches, step, finding.call, rerun.plan.micro_batch)
    return Finding(probe.checks, rerun.plan.runtime.rank, socket.gethostname(), describe_finding(finding), samples)


def bad_weights(model: nn.Module) -> list[str]:
    """Name the weights that are not finite in this rank's shards."""
    parameters = unwrap_model(model).named_parameters()
    return [name for name, parameter in parameters if not local_shard(parameter.detach()).isfinite().all()]


def describe_weights(bad: Sequence[str]) -> str:
    """Name the first of the weights that are not finite."""
    if not bad:
        return "all finite"
    return f"not finite in {bad[0]}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")


def describe_finding(finding: NonFiniteTensor) -> str:
    """Say where the probe first met a value that is not finite."""
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
