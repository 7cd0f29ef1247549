"""Write text with a trained model: `python -m distgpt.sample RUN --prompt TEXT`."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("sample")

import argparse
import io
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from distgpt.checkpoint.reader import load_for_inference
from distgpt.config import from_dict
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.distributed.device import compute_dtype, threads_per_rank
from distgpt.distributed.parallelize import autocast
from distgpt.distributed.runtime import only_rank
from distgpt.errors import DataError, UsageError
from distgpt.model.generate import Sampling
from distgpt.model.gpt import GPT
from distgpt.training.text import Text, write


def main(arguments: argparse.Namespace) -> None:
    """Load a checkpoint, and continue the prompts in the data type that the run computed in."""
    torch.set_num_threads(threads_per_rank(1))
    device = only_rank("sample", arguments.device).device
    prompts = read_prompts(Path(arguments.prompts)) if arguments.prompts else [arguments.prompt or ""]
    model, tokenizer, state = load_for_inference(Path(arguments.run), device, arguments.checkpoint)
    dtype = compute_dtype(from_dict(state.config, source=arguments.run).train.dtype, device)
    with autocast(device, dtype):  # for all texts: it keeps the weights in this data type
        if arguments.interactive:
            converse(model, tokenizer, arguments)
        else:
            write_all(prompts, model, tokenizer, arguments, seed=arguments.seed)


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a file: its lines, or the "prompt" of each object in a .jsonl. Raises DataError."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        prompts = [json.loads(line)["prompt"] for line in lines] if file.suffix == ".jsonl" else lines
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not UTF-8 text, or a line of it is not an object with a prompt: {error}") from None
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"{file} has no prompt, or one that is not text")
    return prompts


def converse(model: GPT, tokenizer: Tokenizer, arguments: argparse.Namespace) -> None:
    """Continue each prompt that is typed, until the end of the input. Ctrl-C stops a text."""
    import readline  # noqa: F401  input() then has line editing and a history

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    print("Type a prompt. Ctrl-C stops a text, Ctrl-D ends.", file=sys.stderr)
    seed, before = arguments.seed, ""
    while True:
        try:
            print(end=before)  # here, a second Ctrl-C is caught as well
            before = ""
            prompt = input("> ")
            write_all([prompt], model, tokenizer, arguments, seed=seed)
            seed += arguments.samples
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            before = "\n"
        except UsageError as error:
            print(f"distgpt: error: {error}", file=sys.stderr)


def write_all(
    prompts: Sequence[str], model: GPT, tokenizer: Tokenizer, arguments: argparse.Namespace, *, seed: int
) -> None:
    """Write --samples texts for each prompt, in batches. The text with index i is drawn with seed + i."""
    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )
    repeated = [prompt for prompt in prompts for _ in range(arguments.samples)]
    texts = []
    for i, prompt in enumerate(repeated):
        try:
            texts.append(Text(prompt, tokenizer, seed=seed + i, max_tokens=arguments.tokens, stops=arguments.stop))
        except (DataError, UnicodeEncodeError) as error:
            which = f" {i // arguments.samples + 1}" if len(prompts) > 1 else ""
            raise UsageError(f"prompt{which}: {error}") from None
    for start in range(0, len(texts), arguments.batch):
        batch = texts[start : start + arguments.batch]
        with closing(write(model, batch, sampling)) as tokens:
            for number, text in enumerate(batch, start + 1):
                if not arguments.json and len(texts) > 1:
                    print(f"--- sample {number} of {len(texts)} ---")
                show(text, tokens, as_json=arguments.json)


def show(text: Text, tokens: Iterator[None], *, as_json: bool) -> None:
    """Print a text as it grows, or its line of JSON when it has ended; the other texts of the batch grow meanwhile."""
    if not as_json:
        print(text.prompt, end="", flush=True)
    while text.end is None:
        next(tokens)
        if not as_json:
            print(text.pop_new(), end="", flush=True)
    if as_json:
        values = {"prompt": text.prompt, "text": text.written, "tokens": text.tokens, "end": text.end}
        print(json.dumps({**values, "seed": text.seed}), flush=True)
    else:
        print(text.pop_new())
