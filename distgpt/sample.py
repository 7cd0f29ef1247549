"""Write text with a trained model: `python -m distgpt.sample RUN --prompt TEXT`."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("sample")

import argparse
import codecs
from pathlib import Path

import torch

from distgpt.checkpoint.reader import load_for_inference
from distgpt.distributed.device import threads_per_rank
from distgpt.errors import DataError, UsageError
from distgpt.model.generate import generate


def main(arguments: argparse.Namespace) -> None:
    """Load a checkpoint, then write each sample to stdout, token by token."""
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
            tokens = generate(
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
        # A token may end inside a character; the decoder keeps its bytes until the next token completes it.
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            if token == model.eot_id:
                break
            print(text.decode(tokenizer.decode_bytes([token])), end="", flush=True)
        print(text.decode(b"", final=True))
