"""The validation loss of a trained model: `python -m distgpt.evaluate RUN`."""

import argparse

from distgpt.checkpoint.choice import add_option
from distgpt.cli import Parser, enter, main_guard
from distgpt.files import user_path


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser(prog="python -m distgpt.evaluate", description="The validation loss of a run's checkpoint.")
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    add_option(parser, default="the newest good one")
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared data (default: the run's own)")
    parser.add_argument("--sequences", type=int, metavar="N", help="validation windows (default: all)")
    arguments = parser.parse_args()
    if arguments.sequences is not None and arguments.sequences < 1:
        parser.error(f"--sequences is {arguments.sequences}: it must be positive")
    return arguments


if __name__ == "__main__":
    # Before torch, which takes seconds to import: --help and a mistyped flag answer at once.
    enter()
    ARGUMENTS = main_guard(parse_arguments)

import sys
from pathlib import Path

from distgpt.checkpoint.reader import load_for_inference
from distgpt.config import from_dict
from distgpt.corpus.loader import EvaluationBatches
from distgpt.distributed.device import compute_dtype
from distgpt.distributed.plan import micro_batch_size
from distgpt.distributed.process_group import joined
from distgpt.distributed.runtime import this_rank
from distgpt.errors import DataError, UsageError
from distgpt.training.evaluation import evaluate
from distgpt.training.startup import open_data_of_run


def main(arguments: argparse.Namespace) -> None:
    """Load, evaluate in one process, print one line."""
    runtime = this_rank()
    if runtime.distributed:
        raise UsageError("evaluate is one process: start it without torchrun")
    with joined(runtime, timeout=0):
        model, tokenizer, state = load_for_inference(Path(arguments.run), runtime.device, arguments.checkpoint)
        config = from_dict(state.config, source=arguments.run)
        fingerprint = None if arguments.data else state.data_fingerprint
        dataset = open_data_of_run(config.data.path, arguments.data, fingerprint=fingerprint)
        if dataset.meta["tokenizer"]["sha256"] != state.tokenizer_sha256:
            raise DataError(f"{dataset.path} was prepared with another tokenizer than {arguments.run} was trained on")
        batches = EvaluationBatches(
            dataset.val,
            block_size=config.model.block_size,
            sequences=arguments.sequences or sys.maxsize,
            micro_batch=micro_batch_size(config, runtime),
            rank=0,
            world_size=1,
            device=runtime.device,
        )
        dtype = compute_dtype(config.train.dtype, runtime.device)
        found = evaluate(model, batches, tokenizer=tokenizer, runtime=runtime, dtype=dtype)
    print(
        f"step {state.step} | val loss {found.val_loss:.4f} | {found.val_bits_per_byte:.3f} bits/byte | "
        f"{batches.windows} windows of {config.model.block_size} tokens from {dataset.path}"
    )


if __name__ == "__main__":
    main_guard(lambda: main(ARGUMENTS))
