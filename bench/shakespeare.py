"""Benchmark of learning: the preset `shakespeare` against the time that its ancestor takes to the same loss.

    python bench/shakespeare.py TEXT [--directory runs/bench-shakespeare] [--seeds 5] [--save]

Trains the preset on TEXT (tinyshakespeare.txt) from several seeds, and for fewer steps with one part of it changed at a
time. Each run has one thread, and its time is CPU time, with its start and evaluations, so a busy machine changes
little. The ancestor takes 5,000 steps of 64 x 256 tokens, which are 20 hours here: it takes two, and the faster one is
multiplied. Runs that are in the directory are not made again.

--save writes a section of bench/RESULTS.md, and the validation losses as bench/shakespeare.png.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from plain_loops import Shape, plain_step
from results import processor, write_section

from distgpt.telemetry.step_lines import read_lines

TITLE = "Learning tinyshakespeare: `python bench/shakespeare.py`"
ANCESTOR_STEPS, ANCESTOR_LOSS = 5000, 1.48
SHORT = ("--run.seed=1", "--train.steps=200", "--eval.every=200")
# What is changed in the short runs.
CHANGES = {
    "the preset": (),
    "AdamW, `optim.lr=2e-3`": ("--optim.name=adamw", "--optim.lr=2e-3"),
    "ReLU, not squared": ("--model.mlp=relu",),
    "learned positions, no RoPE": ("--model.position=learned",),
    "no QK-norm": ("--model.qk_norm=false",),
    "no dropout": ("--model.dropout=0.0",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--directory", type=Path, default=Path("runs/bench-shakespeare"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write bench/RESULTS.md and bench/shakespeare.png")
    arguments = parser.parse_args()
    data, seeds = arguments.directory / "data", range(1, arguments.seeds + 1)
    if not data.exists():
        prepare = ("-m", "distgpt.prepare", "--input", arguments.text, "--output", data, "--tokenizer", "char")
        subprocess.run([sys.executable, *map(str, prepare)], check=True)
    long = {f"seed {seed}": train(arguments.directory / f"seed-{seed}", data, f"--run.seed={seed}") for seed in seeds}
    short = {
        change: train(arguments.directory / "".join(("short", *flags)), data, *SHORT, *flags)
        for change, flags in CHANGES.items()
    }
    text = report(long, short, seconds_of_ancestor())
    print(text)
    if arguments.save:
        write_section(TITLE, text)
        draw(long, Path(__file__).with_suffix(".png"))


def train(run: Path, data: Path, *flags: str) -> tuple[float, dict[int, float]]:
    """Train in the directory `run`, unless it is there. Return the CPU seconds, and the validation loss by step."""
    seconds = run.with_name(f"{run.name}.seconds")
    if not seconds.exists():
        shutil.rmtree(run, ignore_errors=True)  # of a run that was interrupted, whose time is not known
        command = ("-m", "distgpt.train", "shakespeare", f"--data.path={data}", f"--run.dir={run}", *flags)
        before = _cpu_seconds_of_children()
        subprocess.run([sys.executable, *command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        seconds.write_text(f"{_cpu_seconds_of_children() - before:.0f}\n")
    lines = read_lines(run / "metrics.jsonl")
    return float(seconds.read_text()), {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds_of_ancestor() -> float:
    """Return the CPU seconds of the ancestor's training in one thread, from the faster of two steps."""
    torch.set_num_threads(1)
    step = plain_step(Shape(), ancestor=True)
    seconds = []
    for _ in range(2):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    return min(seconds) * ANCESTOR_STEPS


def report(
    long: dict[str, tuple[float, dict[int, float]]], short: dict[str, tuple[float, dict[int, float]]], ancestor: float
) -> str:
    """Return both tables."""
    losses = [last(curve) for _, curve in long.values()]
    seconds = statistics.median(seconds for seconds, _ in long.values())
    steps = max(next(iter(long.values()))[1])
    lines = [
        f"{processor()}, torch {torch.__version__}, one thread, CPU time with start and evaluations.",
        f"{steps} steps of 32 windows of 256 characters; validation loss of 512 windows:",
        "",
        "| | CPU seconds | validation loss |",
        "|---|---|---|",
        *(f"| {name} | {seconds:,.0f} | {last(curve):.4f} |" for name, (seconds, curve) in long.items()),
        "",
        f"Mean {statistics.mean(losses):.4f}, from {min(losses):.4f} to {max(losses):.4f}. The ancestor ends at about "
        f"{ANCESTOR_LOSS} after {ANCESTOR_STEPS:,} steps,",
        f"which take {ancestor:,.0f} CPU seconds (one step, multiplied): {ancestor / seconds:.0f} times as long.",
        "",
        "![validation losses](shakespeare.png)",
        "",
        "One part changed at a time, 200 steps, seed 1:",
        "",
        "| | CPU seconds | validation loss |",
        "|---|---|---|",
        *(f"| {name} | {seconds:,.0f} | {last(curve):.4f} |" for name, (seconds, curve) in short.items()),
    ]
    return "\n".join(lines)


def last(curve: dict[int, float]) -> float:
    return curve[max(curve)]


def draw(runs: dict[str, tuple[float, dict[int, float]]], file: Path) -> None:
    """Draw the validation loss of each run over its CPU seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, (seconds, curve) in runs.items():
        steps = sorted(curve)
        axes.plot([seconds * step / steps[-1] for step in steps], [curve[step] for step in steps], label=name)
    axes.axhline(ANCESTOR_LOSS, color="gray", linestyle="--", label="the ancestor's end")
    axes.set(xlabel="CPU seconds", ylabel="validation loss (nats per character)", ylim=(1.4, 2.0))
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
