"""Print the validation loss of a trained model: `python -m distgpt.evaluate RUN`."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("evaluate")

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from distgpt.checkpoint.compatibility import as_trained
from distgpt.checkpoint.reader import load_for_inference
from distgpt.config import ParallelConfig
from distgpt.distributed.plan import make_plan
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import only_rank
from distgpt.errors import DataError
from distgpt.training.evaluation import evaluate
from distgpt.training.startup import open_data_of_run, validation_batches


def main(arguments: argparse.Namespace) -> None:
    """Load a checkpoint, evaluate it in one process, and print one line."""
    runtime = only_rank("evaluate", arguments.device)
    with process_group(runtime, timeout=0):
        model, tokenizer, state = load_for_inference(Path(arguments.run), runtime.device, arguments.checkpoint)
        config = as_trained(state)
        fingerprint = None if arguments.data else state.data_fingerprint
        dataset = open_data_of_run(config.data.path, arguments.data, fingerprint=fingerprint)
        if dataset.meta["tokenizer"]["sha256"] != state.tokenizer_sha256:
            raise DataError(f"{dataset.path} was prepared with another tokenizer than {arguments.run} was trained on")
        # The strategy of the run may need several ranks, but this is one process.
        on_one_rank = replace(config, parallel=ParallelConfig())
        plan = make_plan(on_one_rank, runtime, vocab_size=state.vocab_size)
        batches = validation_batches(config, plan, dataset, sequences=arguments.sequences or sys.maxsize)
        result = evaluate(model, batches, tokenizer, plan)
    print(
        f"step {state.step} | val loss {result.val_loss:.4f} | {result.val_bits_per_byte:.3f} bits/byte | "
        f"{batches.windows} windows of {config.model.block_size} tokens from {dataset.path}"
    )
