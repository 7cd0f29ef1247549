"""Benchmark of sampling, distgpt against nanoGPT's generate, in the same run: python bench/sampling.py

nanoGPT's generate has no cache: for each token it computes all tokens of the context, cropped to block_size. Both use
the same model with random weights (GPT-2 124M), temperature 0.8 and top_k 200, and take turns. A text is not written
whole: the time of a token is taken at evenly spaced lengths of the context, and its mean over them is reported; the
time to read the context first is not counted. Writes its section of bench/RESULTS.md.
"""

import argparse
import statistics
import textwrap
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial

import torch
from results import processor, write_section
from torch import Tensor

from distgpt.config import resolve
from distgpt.distributed.device import threads_per_rank
from distgpt.distributed.parallelize import autocast
from distgpt.model.generate import Sampling, generate
from distgpt.model.gpt import GPT

TITLE = "Sampling: `python bench/sampling.py`"
VOCAB, EOT = 50_257, 50_256
TEMPERATURE, TOP_K = 0.8, 200
LENGTHS, TOKENS_AT_EACH = 4, 4  # nanoGPT's way takes one token at each length
BATCH = 8
CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Clock = Callable[[], float]
# Takes the length of a context and a clock, and returns seconds per token.
Way = Callable[[int, Clock], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-124m", help="model (default: gpt2-124m)")
    parser.add_argument("--tokens", type=int, default=512, help="length of a text (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument("--threads", type=int, default=threads_per_rank(1), help="threads (default: one a core)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: count the CPU time of this process, for a busy machine, with --threads=1 (default: wall)",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = GPT(resolve([arguments.preset], {}).model, VOCAB, EOT)
    model.init_weights(0)
    model.eval()
    spacing = arguments.tokens // LENGTHS
    lengths = range(spacing // 2, arguments.tokens, spacing)
    ways = {
        "nanoGPT's generate, float32": partial(recomputing, model, torch.float32),
        "nanoGPT's generate, bfloat16": partial(recomputing, model, torch.bfloat16),
        "distgpt, float32": partial(caching, model, torch.float32, 1),
        "distgpt, bfloat16": partial(caching, model, torch.bfloat16, 1),
        f"distgpt, float32, {BATCH} texts at a time": partial(caching, model, torch.float32, BATCH),
        f"distgpt, bfloat16, {BATCH} texts at a time": partial(caching, model, torch.bfloat16, BATCH),
    }
    rates = measure(ways, lengths, arguments.rounds, CLOCKS[arguments.clock])
    text = report(rates, arguments)
    print(text)
    write_section(TITLE, text)


def measure(ways: Mapping[str, Way], lengths: range, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Return the tokens per second of each way in each round."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(lengths[0], clock)  # warms up
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(1 / statistics.mean(way(length, clock) for length in lengths))
    return rates


def report(rates: dict[str, list[float]], arguments: argparse.Namespace) -> str:
    baseline = next(iter(rates.values()))
    lines = []
    for name, rate in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rate, baseline, strict=True)]
        span = f"{min(ratios):.1f} to {max(ratios):.1f}"
        lines.append(f"| {name} | {statistics.median(rate):.1f} | {statistics.median(ratios):.1f} | {span} |")
    threads = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
    about = (
        f"Tokens per second of {'CPU time' if arguments.clock == 'cpu' else 'time'}, `{arguments.preset}` with random "
        f"weights, texts of {arguments.tokens} tokens, {threads}, medians of {arguments.rounds} rounds, "
        f"torch {torch.__version__}, {processor()}. nanoGPT's generate computes the whole context for each token; on a "
        "CPU its sample.py does so in float32. distgpt samples in the data type that the run computed in."
    )
    table = "| | tok/s | ratio | lowest to highest |\n|---|---|---|---|\n" + "\n".join(lines)
    return f"{textwrap.fill(about, 120)}\n\n{table}"


@torch.no_grad()
def recomputing(model: GPT, dtype: torch.dtype, length: int, clock: Clock) -> float:
    """Draw a token as nanoGPT does: compute all logits of the context again, keep the top k, draw, append."""
    context_1T = torch.randint(VOCAB, (1, length))
    with autocast(CPU, dtype):
        next_token(model, context_1T)  # converts the weights, as the first token of a text does
        started = clock()
        next_token(model, context_1T)
        return clock() - started


def next_token(model: GPT, context_1T: Tensor) -> Tensor:
    logits_1V = model(context_1T[:, -model.config.block_size :], last_only=True)[:, -1] / TEMPERATURE
    smallest = logits_1V.topk(TOP_K).values[:, -1:]
    p_1V = torch.softmax(logits_1V.float().masked_fill(logits_1V < smallest, -torch.inf), dim=-1)
    return torch.cat((context_1T, torch.multinomial(p_1V, 1)), dim=1)


def caching(model: GPT, dtype: torch.dtype, texts: int, length: int, clock: Clock) -> float:
    """Continue texts with distgpt's generate."""
    prompts = torch.randint(VOCAB, (texts, length)).tolist()
    with autocast(CPU, dtype), closing(steps(model, prompts)) as after_steps:
        next(after_steps)
        started = clock()
        for _ in range(TOKENS_AT_EACH):
            next(after_steps)
        return (clock() - started) / TOKENS_AT_EACH / texts


def steps(model: GPT, prompts: list[list[int]]) -> Generator[None, None, None]:
    """Yield after each step of a batch."""
    tokens = generate(
        model,
        prompts,
        max_tokens=TOKENS_AT_EACH + 1,
        sampling=Sampling(temperature=TEMPERATURE, top_k=TOP_K),
        generators=[torch.Generator().manual_seed(row) for row in range(len(prompts))],
    )
    for row, _ in tokens:
        if row == len(prompts) - 1:
            yield


if __name__ == "__main__":
    main()
