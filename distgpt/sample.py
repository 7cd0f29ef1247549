"""Write text with a trained model: `python -m distgpt.sample RUN --prompt TEXT`."""

import argparse
import math

from distgpt.checkpoint.choice import add_option
from distgpt.cli import Parser, enter, main_guard
from distgpt.files import user_path


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser(prog="python -m distgpt.sample", description="Write text with a trained model.")
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    add_option(parser, default="the newest good one")
    parser.add_argument("--prompt", default="", help="text to go on from (default: none)")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="tokens to write (default: 500)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts to write (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: all (default: 0)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that reach P")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed writes the same text (default: 0)"
    )
    arguments = parser.parse_args()
    for name in ("tokens", "top_k"):
        if getattr(arguments, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: it cannot be negative")
    if not 0 <= arguments.temperature < math.inf:
        parser.error(f"--temperature is {arguments.temperature}: it must be 0 (greedy) or a positive number")
    if not 0 < arguments.top_p <= 1:
        parser.error(f"--top-p is {arguments.top_p}: it must be above 0 and at most 1")
    if arguments.samples < 1:
        parser.error(f"--samples is {arguments.samples}: it must be positive")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed is {arguments.seed}: it must lie between 0 and 2^63")
    return arguments


if __name__ == "__main__":
    # Before torch, which takes seconds to import: --help and a mistyped flag answer at once.
    enter()
    ARGUMENTS = main_guard(parse_arguments)

import codecs
from pathlib import Path

import torch

from distgpt.checkpoint.reader import load_for_inference
from distgpt.distributed.device import threads_per_rank
from distgpt.errors import DataError, UsageError
from distgpt.model.generate import generate


def main(arguments: argparse.Namespace) -> None:
    """Load, then write each sample to stdout as its tokens come."""
    torch.set_num_threads(threads_per_rank(1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, _ = load_for_inference(Path(arguments.run), device, arguments.checkpoint)
    try:
        prompt_ids = tokenizer.encode(arguments.prompt).tolist()
    except DataError as error:
        raise UsageError(f"--prompt: {error}") from None
    generator = torch.Generator().manual_seed(arguments.seed)
    for number in range(1, arguments.samples + 1):
        try:
            drawn = generate(
                model,
                prompt_ids,
                max_tokens=arguments.tokens,
                temperature=arguments.temperature,
                top_k=arguments.top_k,
                top_p=arguments.top_p,
                generator=generator,
                stop_at_eot=True,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        if arguments.samples > 1:
            print(f"--- sample {number} of {arguments.samples} ---")
        print(arguments.prompt, end="", flush=True)
        # A token may end inside a character: what is not whole yet waits for the next one.
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in drawn:
            if token == model.eot_id:
                break
            print(text.decode(tokenizer.decode_bytes([token])), end="", flush=True)
        print(text.decode(b"", final=True))


if __name__ == "__main__":
    main_guard(lambda: main(ARGUMENTS))
