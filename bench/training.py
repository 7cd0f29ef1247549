"""Benchmark of training on a CPU: distgpt, the ancestor's loop and a loop like nanoGPT's.

    python bench/training.py [speed] [losses] [tiny] [--rounds 3] [--clock wall|cpu] [--text FILE] [--save]

speed
    Seconds of an optimizer step of the model of the preset `seed`, with its dropout, on random tokens. All sides are
    processes that exist at the same time and take steps in turn, so that a busy machine slows all of them. A side of
    one process has all cores; a side of two has half of them for each. The loops to compare with are in plain_loops.py.
    --clock cpu gives each process one thread and counts CPU time, summed over the ranks, for a machine that is too busy
    for anything else; it does not see that all cores but one are idle while F.dropout draws numbers.
losses
    A small model of the same kind learns from --text in float32 and in bfloat16, from several seeds: does bfloat16
    change what is learned by more than other dropout masks do?
tiny
    Milliseconds of a step of distgpt.train, with all that it writes, watches and compares, against a bare loop around
    the same model, for a model so small that this overhead could be most of it. One thread each.

--save writes the result to its section of bench/RESULTS.md.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from plain_loops import Shape, Step, plain_step, random_batch
from results import processor, write_section

from distgpt.config import Config, resolve
from distgpt.corpus.shards import open_dataset
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import this_rank
from distgpt.machine import available_cpus
from distgpt.model.gpt import GPT
from distgpt.model.optim import build_optimizer
from distgpt.telemetry.step_lines import read_lines
from distgpt.training.figures import FigureReader, not_finite
from distgpt.training.step import accumulate_gradients, apply_update

PROJECT = Path(__file__).resolve().parent.parent
TITLE = "Training on a CPU: `python bench/training.py`"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("speed", "losses", "tiny")
SMALL = (
    *("seed", "--model.n_layer=2", "--model.n_head=2", "--model.n_embd=64", "--model.block_size=64"),
    *("--train.global_batch=16", "--optim.lr=3e-3"),
)
TINY = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=32"),
    *("--train.global_batch=8", "--train.dtype=float32"),
)
TRAIN = ("-m", "distgpt.train")
# distgpt.train with other dropout masks, which shows how much the masks alone change.
OTHER_MASKS = """
from distgpt import cli
from distgpt.training import step

derived = step.derived_seed
step.derived_seed = lambda *numbers: derived(0, *numbers)
cli.run("train")
"""
# A program and the data type that it computes in.
LEARNERS = {
    "float32": (TRAIN, "float32"),
    "float32 with other masks": (("-c", OTHER_MASKS), "float32"),
    "bfloat16": (TRAIN, "bfloat16"),
}
LOG_EVERY = 10
QUIET = ("--eval.sequences=256", "--eval.sample_tokens=0", "--checkpoint.every=0")


def config_of(shape: Shape, dtype: str) -> Config:
    """Return the config of distgpt for this shape."""
    names = ("n_layer", "n_head", "n_embd", "block_size", "dropout")
    model = [f"--model.{name}={getattr(shape, name)}" for name in names]
    return resolve(["seed", *model, f"--train.global_batch={shape.batch}", f"--train.dtype={dtype}"], {})


def distgpt_step(shape: Shape, dtype: str) -> Step:
    """Return the step of distgpt.train on this rank."""
    config, runtime = config_of(shape, dtype), this_rank()
    plan = make_plan(config, runtime, vocab_size=shape.vocabulary)
    model = build_model(config, plan, vocab_size=shape.vocabulary, eot_id=None)
    gradients, optimizer = gradients_of(model, plan), build_optimizer(model, config.optim, "cpu")
    x_BT, y_BT = random_batch(replace(shape, batch=plan.micro_batch * plan.accumulation))
    micro_batches = list(zip(torch.split(x_BT, plan.micro_batch), torch.split(y_BT, plan.micro_batch), strict=True))

    reader = FigureReader(runtime, at_once=False)

    def step() -> float:
        norm, values = gradients.finish(accumulate_gradients(gradients, micro_batches, 1, seed=1), stop=False)
        reader.add(1, values, lr=config.optim.lr)
        [figures] = reader.take(now=True)
        apply_update(optimizer, norm, clip=config.optim.grad_clip, skip=not_finite(values))
        optimizer.zero_grad()
        return figures.loss

    return step


PLAIN_SIDES = ("the ancestor's loop", "a loop like nanoGPT's")
# The number of processes of each side, and its step in one of them.
SIDES: dict[str, tuple[int, Callable[[Shape], Step]]] = {
    PLAIN_SIDES[0]: (1, lambda shape: plain_step(shape, ancestor=True)),
    PLAIN_SIDES[1]: (1, lambda shape: plain_step(shape, ancestor=False)),
    "distgpt, float32": (1, lambda shape: distgpt_step(shape, "float32")),
    "distgpt, float32, 2 ranks": (2, lambda shape: distgpt_step(shape, "float32")),
    "distgpt, bfloat16": (1, lambda shape: distgpt_step(shape, "bfloat16")),
    "distgpt, bfloat16, 2 ranks": (2, lambda shape: distgpt_step(shape, "bfloat16")),
}


def serve_steps(side: str, shape: Shape, clock: str) -> None:
    """Run one process of a side: for each line that it reads, take a step and print its seconds."""
    if side in PLAIN_SIDES:
        _serve(SIDES[side][1](shape), CLOCKS[clock])
        return
    with process_group(this_rank(), timeout=600):
        _serve(SIDES[side][1](shape), CLOCKS[clock])


def _serve(step: Step, clock: Callable[[], float]) -> None:  # the model dies in here, before the process group does
    for _ in sys.stdin:
        started = clock()
        step()
        print(clock() - started, flush=True)


@contextmanager
def side_processes(side: str, shape: Shape, clock: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Start the processes of a side, and end them."""
    count = SIDES[side][0]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    command = [sys.executable, __file__, "--side", side, "--shape", json.dumps(asdict(shape)), "--clock", clock]
    place = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Found also where PYTHONSAFEPATH is set.
    modules = {"PYTHONPATH": str(Path(__file__).parent)}
    threads = {"OMP_NUM_THREADS": str(1 if clock == "cpu" else max(1, available_cpus() // count))}
    with ExitStack() as stack:
        ranks = []
        for number in map(str, range(count)):
            variables = {**os.environ, **modules, **place, **threads, "RANK": number, "LOCAL_RANK": number}
            process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ranks.append(stack.enter_context(process))
        yield ranks
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.close()  # ends it


def seconds_of_a_step(ranks: Sequence["subprocess.Popen[str]"], clock: str) -> float:
    """Let a side take a step; return the time of its slowest rank, or the CPU time of all."""
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    seconds = [float(rank.stdout.readline()) for rank in ranks if rank.stdout is not None]
    return sum(seconds) if clock == "cpu" else max(seconds)


def measure_speed(shape: Shape, rounds: int, clock: str) -> dict[str, list[float]]:
    """Return the seconds of the steps of each side, in rounds; a first step of each warms up."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        sides = {side: stack.enter_context(side_processes(side, shape, clock)) for side in SIDES}
        for _ in range(rounds + 1):
            for side, ranks in sides.items():
                seconds[side].append(seconds_of_a_step(ranks, clock))
    return {side: times[1:] for side, times in seconds.items()}


def speed_table(shape: Shape, seconds: Mapping[str, Sequence[float]], clock: str) -> str:
    """Return medians of seconds, and of the ratios to both plain loops within each round."""

    def ratio(side: str, base: str) -> float:
        return statistics.median(b / s for b, s in zip(seconds[base], seconds[side], strict=True))

    ancestor, nano = PLAIN_SIDES
    tokens = shape.batch * shape.block_size
    how = "one thread a process, CPU time of all ranks" if clock == "cpu" else f"{available_cpus()} cores"
    lines = [
        f"A step of {shape.batch} x {shape.block_size} tokens, {how}, medians of {len(seconds[ancestor])} rounds.",
        "",
        "| | seconds a step | tokens a second | times the ancestor's | times nanoGPT's |",
        "|---|---|---|---|---|",
    ]
    for side, times in seconds.items():
        median = statistics.median(times)
        speeds = f"{ratio(side, ancestor):.2f} | {ratio(side, nano):.2f}"
        lines.append(f"| {side} | {median:.2f} | {tokens / median:,.0f} | {speeds} |")
    return "\n".join(lines)


def train(directory: Path, data: Path, *flags: str, program: Sequence[str] = TRAIN) -> list[dict[str, float]]:
    """Train to the end with distgpt.train in one thread; return what it logged."""
    command = [sys.executable, *program, *flags, f"--data.path={data}", f"--run.dir={directory}", *QUIET]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=variables, check=True, capture_output=True, cwd=PROJECT)
    return read_lines(directory / "metrics.jsonl")


def losses_table(directory: Path, data: Path, *, steps: int, seeds: int) -> str:
    """Train in each of LEARNERS from several seeds; return their losses, and how far they differ from the first."""
    lines = [
        f"{steps} steps of a small model, of a seed all with the same weights and data:",
        f"`{' '.join(SMALL)}`.",
        "Training loss, the mean of the last tenth of the steps, and validation loss:",
        "",
        f"| seed | {' | '.join(LEARNERS)} |",
        f"|---{'|---' * len(LEARNERS)}|",
    ]
    validation: dict[str, list[float]] = {name: [] for name in LEARNERS}
    for seed in range(1, seeds + 1):
        cells = []
        for number, (name, (program, dtype)) in enumerate(LEARNERS.items()):
            flags = (f"--run.seed={seed}", f"--train.steps={steps}", "--eval.every=0", "--log.every=1")
            of_run = directory / f"{number}-{seed}"
            logged = train(of_run, data, *SMALL, *flags, f"--train.dtype={dtype}", program=program)
            losses = [line["loss"] for line in logged if "loss" in line]
            validation[name].append(logged[-1]["val_loss"])
            cells.append(f"{statistics.fmean(losses[-steps // 10 :]):.4f}, {validation[name][-1]:.4f}")
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    first, *others = LEARNERS
    apart = [
        f"{statistics.fmean(abs(a - b) for a, b in zip(validation[name], validation[first], strict=True)):.4f} ({name})"
        for name in others
    ]
    return "\n".join([*lines, "", f"Validation losses lie {' and '.join(apart)} from {first}, on average."])


def bare_loop(data: Path, steps: int) -> float:
    """Train the tiny model in the simplest loop, without a norm of gradients; return the median seconds of a step."""
    config, tokens = resolve(TINY, {}), open_dataset(data)
    windows = np.memmap(data / "train-00000.bin", dtype=np.uint16, mode="r")
    model = GPT(config.model, tokens.vocab_size)
    model.init_weights(1)
    optimizer = build_optimizer(model, config.optim, "cpu")
    T, times = config.model.block_size, [time.perf_counter()]
    for step in range(1, steps + 1):
        starts = np.random.randint(len(windows) - T, size=config.train.global_batch)
        batch = torch.from_numpy(np.stack([windows[s : s + T + 1].astype(np.int64) for s in starts]))
        loss = model(batch[:, :-1], batch[:, 1:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if step % LOG_EVERY == 0:
            times.append(time.perf_counter())
    return statistics.median(np.diff(times).tolist()) / LOG_EVERY


def tiny_table(directory: Path, data: Path, *, steps: int, rounds: int) -> str:
    """Train the tiny model with distgpt.train and in a bare loop, in turn; return the times of a step."""
    ours, bare = [], []
    bare_command = [sys.executable, __file__, "--bare", str(data), "--steps", str(steps)]
    for number in range(rounds):
        flags = (f"--train.steps={steps}", "--eval.every=0", f"--log.every={LOG_EVERY}")
        logged = train(directory / f"tiny-{number}", data, *TINY, *flags)
        ours.append(statistics.median(line["seconds"] for line in logged if "seconds" in line))
        done = subprocess.run(bare_command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        bare.append(float(done.stdout))
    ratio = statistics.median(o / b for o, b in zip(ours, bare, strict=True))
    return (
        f"A step of a model of 30,000 parameters takes {1e3 * statistics.median(ours):.2f} ms in distgpt.train and "
        f"{1e3 * statistics.median(bare):.2f} ms in a bare loop around the same model: {ratio:.2f} times as long "
        f"(medians of {rounds} runs of each, in turn)."
    )


def prepare(directory: Path, text: Path) -> Path:
    """Prepare a text by characters."""
    flags = [f"--input={text}", f"--output={directory / 'data'}", "--tokenizer=char"]
    subprocess.run([sys.executable, "-m", "distgpt.prepare", *flags], check=True, capture_output=True, cwd=PROJECT)
    return directory / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"parts to measure, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which the sides take turns (default: 3)")
    parser.add_argument("--batch", type=int, default=64, help="sequences a step of the speed part (default: 64)")
    parser.add_argument("--steps", type=int, default=500, help="steps of losses and tiny (default: 500)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of losses (default: 3)")
    parser.add_argument("--text", type=Path, default=PROJECT.parent / "shared" / "data" / "tinyshakespeare.txt")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="clock of the speed part (default: wall)")
    parser.add_argument("--save", action="store_true", help="write bench/RESULTS.md")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: take {', '.join(PARTS)}")
    if arguments.side:
        serve_steps(arguments.side, Shape(**json.loads(arguments.shape)), arguments.clock)
    elif arguments.bare:
        print(bare_loop(arguments.bare, arguments.steps))
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure the parts asked for and print them, the fastest to measure last."""
    parts = arguments.parts or PARTS
    sections = [f"{processor()}, torch {torch.__version__}. Take the ratios; the times are those of this machine."]
    print(sections[0], flush=True)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if "speed" in parts:
            shape = Shape(batch=arguments.batch)
            seconds = measure_speed(shape, arguments.rounds, arguments.clock)
            sections.append(speed_table(shape, seconds, arguments.clock))
            print(f"\n{sections[-1]}", flush=True)
        if "losses" in parts or "tiny" in parts:
            data = prepare(directory, arguments.text)
        if "losses" in parts:
            sections.append(losses_table(directory, data, steps=arguments.steps, seeds=arguments.seeds))
            print(f"\n{sections[-1]}", flush=True)
        if "tiny" in parts:
            sections.append(tiny_table(directory, data, steps=arguments.steps, rounds=arguments.rounds))
            print(f"\n{sections[-1]}", flush=True)
    if arguments.save:
        write_section(TITLE, "\n\n".join(sections))


if __name__ == "__main__":
    main()
