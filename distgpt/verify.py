"""Check that the checkpoints of a run are what they claim to be: `python -m distgpt.verify RUN [--replay K]`.

Hash all files -> check the chain, and what each checkpoint was made from -> with --replay, take the steps from one
checkpoint to the next again and compare all bits. The run directory is not changed.
"""

from distgpt import cli

if __name__ == "__main__":
    cli.run("verify")

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distgpt.checkpoint.chain import device_of, layout_of
from distgpt.checkpoint.choice import NEWEST, choose, is_checkpoint
from distgpt.checkpoint.manifest import Origin, checkpoint_path, committed, read_origin, step_of
from distgpt.checkpoint.reader import TrainingState, flattened
from distgpt.corpus.shards import Dataset
from distgpt.distributed.collectives import broadcast_from_rank_zero, values_of_ranks
from distgpt.distributed.plan import Plan
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import Runtime, only_rank, this_rank
from distgpt.errors import DataError, UsageError
from distgpt.run.paths import RunPaths
from distgpt.training.audit import Checked, audit
from distgpt.training.rerun import TIMEOUT_SECONDS, Rerun, Start, attempt_of, config_here, open_data, start_from
from distgpt.units import ranks_text, size_text

HEADINGS = ("checkpoint", "size", "files", "chain", "data", "code", "config")


def main(arguments: argparse.Namespace) -> None:
    """Check a run on rank 0, then replay steps of it on all ranks. Raises DataError if it is not what it states."""
    path, steps = Path(arguments.run), arguments.replay
    run = RunPaths(path.resolve().parents[1] if is_checkpoint(path) else path)
    runtime = this_rank(arguments.device) if steps else only_rank("verify without --replay", arguments.device)
    report: dict[str, Any] = {"run": arguments.run}
    found: dict[str, Any] = {}
    if runtime.rank == 0:  # it checks for all, which wait until it is done
        alone = is_checkpoint(path) and not steps
        checkpoints = [path.resolve()] if alone else committed(run.checkpoints)[::-1]
        if not checkpoints:
            choose(path)  # says why there are none
        checked, problems = audit(checkpoints, run, arguments.data)
        report |= {"checkpoints": list(map(asdict, checked)), "problems": problems}
        if not arguments.json:
            print("\n".join(table(checked)), flush=True)
        if not problems and steps:
            start, successor = choose_steps(run, path, arguments.checkpoint, at_most=steps)
            config_here(start, runtime)
            open_data(start, arguments.data)
            found = {"start": start.to_json(), "successor": str(successor)}
        else:
            conclude(report, as_json=arguments.json)
    if steps:
        with process_group(runtime, timeout=TIMEOUT_SECONDS):
            found = broadcast_from_rank_zero(found, runtime)
            start, successor = Start.from_json(**found["start"]), Path(found["successor"])
            report |= replay(start, successor, runtime, open_data(start, arguments.data))
        if runtime.rank == 0:
            conclude(report, as_json=arguments.json)


def table(checked: Sequence[Checked]) -> list[str]:
    """Return the lines of a table with a line for each checkpoint."""
    rows = [HEADINGS]
    rows += [(c.checkpoint, size_text(c.bytes), c.files, c.chain, c.data, c.code, c.config) for c in checked]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def conclude(report: dict[str, Any], *, as_json: bool) -> None:
    """Print the result. Raises DataError if the run is not what it states."""
    problems, chains = report["problems"], [checked["chain"] for checked in report["checkpoints"]]
    if as_json:
        print(json.dumps(report))
    if problems:
        more = "" if len(problems) == 1 else f" (and {len(problems) - 1} more: see --json)"
        raise DataError(f"{problems[0]}{more}")
    if as_json:
        return
    if again := report.get("replayed"):
        steps = f"steps {again['first']} to {again['last']} on {ranks_text(again['ranks'])}"
        print(f"replayed: {steps} give the same bits, weights and optimizer state, SHA-256 {again['sha256']}")
    unchained, gone = chains.count("without a chain"), sum(chain.endswith("gone") for chain in chains)
    print(
        f"good: {len(chains)} checkpoint{'s' * (len(chains) > 1)}, whole and as stated"
        + (f"; {unchained} without a chain" if unchained else "")
        + (f"; {gone} after one that is gone, which cannot be checked" if gone else "")
    )


def choose_steps(run: RunPaths, path: Path, choice: str, *, at_most: int) -> tuple[Start, Path]:
    """Choose a checkpoint, or the initial weights, and the next checkpoint of the run, `at_most` so many steps later.

    The next one states that it follows the other, so one attempt with one config took all steps between them. Raises
    UsageError if there are no two such checkpoints.
    """
    chosen = step_of(choose(path, choice)) if is_checkpoint(path) or choice != NEWEST else None
    pairs: list[tuple[int, Path]] = []  # the step of the start, and the next checkpoint; the newest first
    for successor in committed(run.checkpoints):
        if origin := read_origin(successor):
            step = origin.previous.step if origin.previous else 0
            is_here = not origin.previous or checkpoint_path(run.checkpoints, step).is_dir()
            pairs += [(step, successor)] if is_here and chosen in (None, step) else []
    near = [(step, successor) for step, successor in pairs if step_of(successor) - step <= at_most]
    if not near:
        fewest = min((step_of(successor) - step for step, successor in pairs), default=0)
        why = f"the next checkpoint is {fewest} steps later: take --replay {fewest}"
        raise UsageError(f"nothing to replay: {why if pairs else 'no checkpoint is here with the one that it follows'}")
    step, successor = near[0]
    checkpoint = checkpoint_path(run.checkpoints, step)
    if checkpoint.is_dir():
        return start_from(checkpoint, run, step + 1), successor
    return Start(*attempt_of(run, 1, None)), successor


def replay(start: Start, successor: Path, runtime: Runtime, dataset: Dataset) -> dict[str, Any]:
    """Take the steps to the next checkpoint again, and compare weights and optimizer state with it, bit by bit.

    Returns their part of the report. Raises UsageError if equal bits cannot be expected here.
    """
    first, last = start.step + 1, step_of(successor)
    with closing(Rerun(start, runtime, dataset)) as rerun:
        origin = read_origin(successor)
        assert origin is not None, "choose_steps found it"
        require_equal_rounding(origin, rerun.plan)
        rerun.take_steps(last)
        own = tensor_hashes(rerun.state, runtime)
        rerun.state.load(successor)
        saved = tensor_hashes(rerun.state, runtime)
    different = sorted(name for name in saved if own[name] != saved[name])
    sha256 = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    found = {"first": first, "last": last, "ranks": runtime.world_size, "sha256": sha256, "different": different}
    problem = (
        f"steps {first} to {last}, taken again, do not lead to {successor.name}: {len(different)} of {len(saved)} "
        f"tensors differ, such as {next(iter(different), '')}; it was made by {origin.version} on {origin.device}"
    )
    return {"replayed": found, "problems": [problem] if different else []}


def require_equal_rounding(origin: Origin, plan: Plan) -> None:
    """Raise UsageError if steps that are taken again here are not equal to the bit."""
    device, layout = device_of(plan), layout_of(plan)
    if device != origin.device:
        raise UsageError(f"the run was trained on {origin.device}: a replay on {device} would round otherwise")
    if plan.exact:
        return
    if plan.runtime.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        raise UsageError("the run was trained without train.deterministic: its kernels may round otherwise each time")
    if layout != origin.layout:
        raise UsageError(
            f"the run was trained as {origin.layout}: a replay as {layout} would round otherwise; take the same "
            "layout, or train with --parallel.reduction=exact"
        )


def tensor_hashes(state: TrainingState, runtime: Runtime) -> dict[str, str]:
    """Return the SHA-256 of each tensor of a run, whole, by name. All ranks call it."""
    hashes = {}
    for name, tensor in flattened(state.tensors()).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        content = whole.detach().cpu().contiguous().flatten().view(torch.uint8)
        hashes[name] = hashlib.sha256(content.numpy().data).hexdigest()
    # Replicas that train independently have tensors of their own.
    return {name: text for of_rank in values_of_ranks(hashes, runtime) for name, text in of_rank.items()}
