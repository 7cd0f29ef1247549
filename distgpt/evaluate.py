"""Print the loss of a trained model on data, or its accuracy on a task: `python -m distgpt.evaluate RUN`."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("evaluate")

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from distgpt.checkpoint.choice import choose
from distgpt.checkpoint.compatibility import as_trained
from distgpt.checkpoint.manifest import TOKENIZER, RunState, read_state
from distgpt.checkpoint.reader import load_model, read_tokenizer
from distgpt.config import ParallelConfig
from distgpt.corpus.shards import Dataset
from distgpt.distributed.collectives import broadcast_from_rank_zero
from distgpt.distributed.plan import Plan, make_plan
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import Runtime, this_rank
from distgpt.errors import DataError
from distgpt.training.evaluation import evaluate
from distgpt.training.multiple_choice import read_questions, score
from distgpt.training.startup import open_data_of_run, validation_batches

# A rank may wait this long for the slowest one, since they meet only at the end.
TIMEOUT_SECONDS = 86400.0


def main(arguments: argparse.Namespace) -> None:
    """Evaluate one checkpoint on all ranks, and print the result on rank 0."""
    runtime = this_rank(arguments.device)
    # Rank 0 chooses for all, since a run that trains may soon have a newer one. The others wait until it is verified.
    found = str(find_checkpoint(arguments)) if runtime.rank == 0 else ""
    with process_group(runtime, timeout=TIMEOUT_SECONDS):
        result = measure(arguments, Path(broadcast_from_rank_zero(found, runtime)), runtime)
    if runtime.rank == 0:
        print(json.dumps(result) if arguments.json else describe(result))


def find_checkpoint(arguments: argparse.Namespace) -> Path:
    """Choose a checkpoint; verify it, and the data or the task. Raises UsageError, DataError or StorageError."""
    checkpoint = choose(Path(arguments.run), arguments.checkpoint)
    state = read_state(checkpoint)
    if arguments.task:
        read_questions(Path(arguments.task), read_tokenizer(checkpoint, state), as_trained(state).model.block_size)
    else:
        open_data(arguments, checkpoint, state)
    return checkpoint


def open_data(arguments: argparse.Namespace, checkpoint: Path, state: RunState) -> Dataset:
    """Open and verify --data, or the data of the run. Raises DataError, for example if it has another tokenizer."""
    fingerprint = None if arguments.data else state.data_fingerprint
    dataset = open_data_of_run(as_trained(state).data.path, arguments.data, fingerprint=fingerprint)
    if dataset.meta["tokenizer"]["sha256"] != state.tokenizer_sha256:
        fix = f"prepare it with --tokenizer {checkpoint / TOKENIZER}"
        raise DataError(f"{dataset.path} has another tokenizer than {arguments.run} was trained with: {fix}")
    return dataset


def measure(arguments: argparse.Namespace, checkpoint: Path, runtime: Runtime) -> dict[str, Any]:
    """Return the result to print. Every rank holds the whole model, and computes its share of the batches."""
    model, tokenizer, state = load_model(checkpoint, runtime.device)
    about, block_size = {"checkpoint": str(checkpoint), "step": state.step}, model.config.block_size
    plan = plan_for(state, runtime)
    if arguments.task:
        scores = score(model, read_questions(Path(arguments.task), tokenizer, block_size), plan)
        return {**about, "task": arguments.task, **asdict(scores)}
    dataset = open_data(arguments, checkpoint, state)
    windows = arguments.sequences or sys.maxsize
    batches = validation_batches(as_trained(state), plan, dataset, sequences=windows, split=arguments.split)
    found = evaluate(model, batches, tokenizer, plan)
    return {
        **about,
        "data": str(dataset),
        "split": arguments.split,
        "loss": found.val_loss,
        "losses": dict(found.val_losses),
        "standard_error": found.standard_error,
        "bits_per_byte": found.val_bits_per_byte,
        "windows": batches.windows,
        "block_size": block_size,
    }


def plan_for(state: RunState, runtime: Runtime) -> Plan:
    """Return the plan of one process for this rank, so that the micro-batch is the same for any number of ranks."""
    config = replace(as_trained(state), parallel=ParallelConfig())
    alone = replace(runtime, rank=0, world_size=1, local_world_size=1)
    return replace(make_plan(config, alone, vocab_size=state.vocab_size), runtime=runtime)


def describe(result: dict[str, Any]) -> str:
    """Format a result as one line; for a mix, with one more line for each dataset."""
    parts = [f"step {result['step']}"]
    if "task" in result:
        parts += [f"{name} {_with_error(result[name], result[f'{name}_stderr'])}" for name in ("acc", "acc_norm")]
        parts.append(f"{result['questions']} questions from {result['task']}")
    else:
        parts.append(f"{result['split']} loss {_with_error(result['loss'], result['standard_error'])}")
        parts.append(f"{result['bits_per_byte']:.3f} bits/byte")
        parts.append(f"{result['windows']} windows of {result['block_size']} tokens from {result['data']}")
    each = [f"{name} | {result['split']} loss {loss:.4f}" for name, loss in result.get("losses", {}).items()]
    return "\n".join([" | ".join(parts), *each])


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} (standard error {error:.4f})"
