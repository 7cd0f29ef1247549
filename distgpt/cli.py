"""The parts that all commands share: options, exit codes, and early signals. Imports no torch.

`python -m distgpt.COMMAND` calls run() before it imports torch, which takes seconds. So --help and a mistyped option
are answered at once, a signal to stop ends the command silently, and no rank outlives its torchrun.
"""

import argparse
import importlib
import io
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, TypeVar

from distgpt.checkpoint.choice import NEWEST, add_option
from distgpt.config import Config, preset_names, resolve
from distgpt.errors import DISK_FULL, EXIT_BUG, EXIT_INTERRUPTED, EXIT_IO, STOP_SIGNALS, DistgptError, UsageError
from distgpt.files import user_path
from distgpt.planning.devices import DEVICES, device_named
from distgpt.run.exit_report import exit_if_restart_cannot_help
from distgpt.run.paths import RunPaths
from distgpt.torchrun import RANK_ZERO_SECONDS, die_with_agent, place_in_job, print_cause
from distgpt.units import parse_count
from distgpt.usage import Parser, config_from_command_line
from distgpt.weights.source import model_of_start

T = TypeVar("T")

DISTRIBUTED_FLAG = "--distributed"
TRAIN_ABOUT = "Train a GPT on a prepared corpus, or go on with the run in its run directory."


def run(command: str) -> NoReturn:
    """Run `distgpt.COMMAND` to its end: parse the options, then import the module and call its main()."""
    prepare_process()
    options = COMMANDS[command].options
    assert options is not None
    arguments = main_guard(lambda: options(sys.argv[1:]))
    module = importlib.import_module(f"distgpt.{command}")
    sys.exit(main_guard(lambda: module.main(*arguments)))


def train_options(arguments: Sequence[str]) -> tuple[Config]:
    """Read the config of a run, and make this rank die with its torchrun. Raises UsageError."""
    die_with_agent()
    config = config_from_command_line(arguments, prog="distgpt.train", about=TRAIN_ABOUT, model_of=model_of_start)
    place_in_job()
    exit_if_restart_cannot_help(RunPaths(config.run_dir))
    return (config,)


def doctor_options(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Read the config and --distributed. Raises UsageError."""
    distributed = DISTRIBUTED_FLAG in arguments
    config = config_from_command_line(
        [argument for argument in arguments if argument != DISTRIBUTED_FLAG],
        prog="distgpt.doctor",
        about="Check that this machine, the data and the run directory are fit to train. Print a fix for each problem.",
        options={DISTRIBUTED_FLAG: "under torchrun: also check all hosts together; names slow links and hosts"},
        model_of=model_of_start,
    )
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if distributed and not under_torchrun:
        torchrun = f"torchrun --nproc_per_node=2 -m distgpt.doctor {DISTRIBUTED_FLAG}"
        raise UsageError(f"{DISTRIBUTED_FLAG} needs torchrun: {torchrun}")
    if under_torchrun and not distributed:
        raise UsageError(f"under torchrun, add {DISTRIBUTED_FLAG}")
    return config, distributed


def evaluate_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.evaluate, and make this rank die with its torchrun. Raises UsageError."""
    die_with_agent()
    parser = Parser(
        prog="python -m distgpt.evaluate",
        description="Print the loss of a checkpoint on prepared data, or its accuracy on a multiple-choice task. Under "
        "torchrun, each rank computes a part.",
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    add_option(parser, default="the newest good one")
    add_device(parser)
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared data (default: the run's own)")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="of the data (default: val)")
    parser.add_argument("--sequences", type=int, metavar="N", help="windows, spread over the split (default: all)")
    task = 'questions in place of data: JSON lines with "ctx", "endings" and "label", as HellaSwag has them'
    parser.add_argument("--task", type=user_path, metavar="FILE", help=task)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(arguments)
    if options.sequences is not None and options.sequences < 1:
        parser.error(f"--sequences is {options.sequences}: it must be positive")
    if options.task and (options.data or options.sequences or options.split != "val"):
        parser.error("--task reads no data: leave out --data, --split and --sequences")
    place_in_job()
    return (options,)


def sample_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.sample. Raises UsageError."""
    parser = Parser(prog="python -m distgpt.sample", description="Write text with a trained model.")
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    add_option(parser, default="the newest good one")
    add_device(parser)
    what = parser.add_argument_group("what to write")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to go on from (default: none)")
    source.add_argument(
        "--prompts",
        type=user_path,
        metavar="FILE",
        help='one prompt per line; of a .jsonl file, the "prompt" of each object',
    )
    source.add_argument("--interactive", action="store_true", help="ask for prompts; Ctrl-C stops a text, Ctrl-D ends")
    what.add_argument("--tokens", type=int, default=500, metavar="N", help="tokens to write at most (default: 500)")
    what.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    what.add_argument("--samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    what.add_argument("--batch", type=int, default=16, metavar="N", help="texts written at a time (default: 16)")
    what.add_argument("--json", action="store_true", help="print a JSON object for each text, one per line")
    how = parser.add_argument_group("how tokens are drawn, in this order")
    how.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="make tokens less likely that the text already has; 1: do not (default: 1)",
    )
    how.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: 0.8)")
    how.add_argument("--top-k", type=int, default=0, metavar="K", help="from the K likeliest; 0: from all (default: 0)")
    how.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="from the fewest that together reach P (default: 1)"
    )
    how.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="from those at least P times as likely as the likeliest (default: 0)",
    )
    seeds = "seed of the first text; the next have S + 1, S + 2, ... (default: 0)"
    how.add_argument("--seed", type=int, default=0, metavar="S", help=seeds)
    options = parser.parse_args(arguments)
    check_sample_options(parser, options)
    return (options,)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device."""
    about = "auto: an NVIDIA GPU, else an Apple GPU, else the CPU (default: auto)"
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help=about)


def check_sample_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raise UsageError for a value out of range, or values that do not go together."""
    conditions = {
        "tokens": (options.tokens >= 0, "it cannot be negative"),
        "samples": (options.samples >= 1, "it must be positive"),
        "batch": (options.batch >= 1, "it must be positive"),
        "temperature": (0 <= options.temperature < math.inf, "it must be 0 (greedy) or a positive number"),
        "top_k": (options.top_k >= 0, "it cannot be negative"),
        "top_p": (0 < options.top_p <= 1, "it must be above 0 and at most 1"),
        "min_p": (0 <= options.min_p <= 1, "it must lie between 0 and 1"),
        "repetition_penalty": (0 < options.repetition_penalty < math.inf, "it must be a positive number"),
        "seed": (0 <= options.seed < 2**63, "it must lie between 0 and 2^63"),
    }
    for name, (holds, condition) in conditions.items():
        if not holds:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}: {condition}")
    if "" in options.stop:
        parser.error("--stop is empty: give the text before which a sample ends")
    if options.json and options.interactive:
        parser.error("--json and --interactive do not go together: give --prompts FILE")
    if options.samples > 1 and options.temperature == 0:
        parser.error(f"--samples is {options.samples}, but all texts are the same with --temperature=0")


def export_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.export. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.export",
        description="Write the model of a checkpoint for Hugging Face transformers, and for what reads its files.",
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    parser.add_argument("output", type=user_path, metavar="DIR", help="directory to make")
    add_option(parser, default="the newest good one")
    formats = "transformers: as GPT-2, Llama, Qwen2 or Qwen3; plain: under our own names (default: transformers)"
    parser.add_argument("--format", choices=("transformers", "plain"), default="transformers", help=formats)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export, in one step")
    return (parser.parse_args(arguments),)


def report_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.report. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.report",
        description="Write a page about a run, or one that compares several: one HTML file that needs no network.",
    )
    parser.add_argument("runs", type=user_path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--output", type=user_path, default="report.html", metavar="FILE", help="page to write (default: report.html)"
    )
    return (parser.parse_args(arguments),)


def plan_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of distgpt.plan, and return them with the arguments of the config. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.plan",
        usage="%(prog)s [PRESET or file.toml ...] [--section.key=value ...]\n       [options]",
        description="Say what a run will take before it starts: memory, bytes sent, time, cost, and the best layout.",
        epilog=f"presets: {', '.join(preset_names())}; keys: python -m distgpt.train --help",
    )
    where = parser.add_argument_group("where it runs")
    names = ", ".join(DEVICES)
    where.add_argument("--device", default="h100", metavar="NAME", help=f"{names} (this one) (default: h100)")
    where.add_argument("--nodes", type=positive(int), default=1, metavar="N", help="number of nodes (default: 1)")
    gpus = "GPUs of each node (default: 8; for GeForce cards and the CPU 1)"
    where.add_argument("--gpus-per-node", type=positive(int), metavar="G", help=gpus)
    length = parser.add_argument_group("how long (default: train.steps)").add_mutually_exclusive_group()
    length.add_argument("--tokens", type=positive(parse_count), metavar="T", help="tokens to train on, as 10B or 2.5e9")
    length.add_argument(
        "--budget",
        type=positive(gpu_hours),
        metavar="B",
        help="24gpu-hours or 3gpu-days: also gives the compute-optimal size; without PRESET, takes the nearest one",
    )
    values = parser.add_argument_group("what is assumed")
    values.add_argument("--price", type=positive(float), metavar="X", help="price of a GPU-hour")
    values.add_argument("--mfu", type=positive(float), metavar="M", help="MFU, 0 to 1, for example from a run's log")
    values.add_argument("--network", type=positive(float), metavar="GBIT", help="Gbit/s from a node to others")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    options, config_arguments = parser.parse_known_args(arguments)
    device_named(options.device)
    if options.mfu is not None and options.mfu > 1:
        parser.error(f"--mfu is {options.mfu:g}: it must be above 0 and at most 1")
    resolve(config_arguments, os.environ)
    return options, config_arguments


def positive(convert: Callable[[str], float]) -> Callable[[str], float]:
    """Return a type for argparse: `convert`, refused unless it gives a positive and finite number."""

    def converted(text: str) -> float:
        with suppress(ValueError):
            if 0 < (value := convert(text)) < math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'whole ' * (convert is int)}number")

    return converted


def gpu_hours(text: str) -> float:
    """Return the GPU-hours in a text like 24gpu-hours or 3gpu-days. Raises ValueError."""
    number, hours, days = text.strip().lower().partition("gpu-")
    if hours and days.rstrip("s") in ("hour", "day"):
        return parse_count(number) * (24 if days.startswith("day") else 1)
    raise argparse.ArgumentTypeError(f"{text!r} is no budget: write 24gpu-hours or 3gpu-days")


def replay_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.replay, and make this rank die with its torchrun. Raises UsageError."""
    die_with_agent()
    parser = Parser(
        prog="python -m distgpt.replay",
        description="Compute a step of a run again, and name the first layer whose values are not finite. Runs on any "
        "number of ranks under torchrun, whatever the run was trained on; with diloco a multiple of its replicas.",
    )
    parser.add_argument(
        "run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it to start from"
    )
    add_option(parser, default="the newest good one before S")
    add_device(parser)
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the step, as numbered in metrics.jsonl")
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared data (default: the run's own)")
    options = parser.parse_args(arguments)
    place_in_job()
    return (options,)


def verify_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.verify, and make this rank die with its torchrun. Raises UsageError."""
    die_with_agent()
    parser = Parser(
        prog="python -m distgpt.verify",
        description="Check every checkpoint of a run: its files, its place in the chain, and whether config.toml, data "
        "and code are still those that it was made from.",
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    replay = "also take the steps from a checkpoint to the next one again, if these are at most K, and compare all bits"
    parser.add_argument("--replay", type=positive(int), metavar="K", help=replay)
    add_option(parser, default="with --replay, start from the newest one that has a next one within K steps")
    add_device(parser)
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared data (default: the run's own)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(arguments)
    if options.checkpoint != NEWEST and not options.replay:
        parser.error("--checkpoint chooses where --replay starts: give --replay K")
    place_in_job()
    return (options,)


def completion_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.completion. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.completion",
        description='Print a script that completes `distgpt` in a shell: eval "$(distgpt completion bash)"',
    )
    parser.add_argument("shell", choices=("bash", "zsh"), help="the shell that will read the script")
    return (parser.parse_args(arguments),)


def runs_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.runs. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.runs",
        description="List the runs under a directory, the one that changed last first. A run without a report of its "
        "end shows as running until its lease ends, 10 seconds after its last sign of life.",
    )
    parser.add_argument(
        "directory", type=user_path, nargs="?", default="runs", metavar="DIR", help="searched at any depth (runs/)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="repeat it every two seconds, until Ctrl-C")
    how.add_argument("--json", action="store_true", help="print a JSON object a line for each run")
    return (parser.parse_args(arguments),)


def prepare_process() -> None:
    """Let a signal to stop end this process silently, and print "?" for characters that stdout cannot encode.

    Lets CUDA's allocator grow its segments, so that blocks of other sizes leave no gaps. torch reads this as it starts.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # An operation that PyTorch does not have on Apple GPUs runs on the CPU.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, so we do too
            # Not an exception, which an unfinished import would print or ignore.
            signal.signal(number, lambda *_: os._exit(EXIT_INTERRUPTED))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main_guard(main: Callable[[], T]) -> T:
    """Return `main()`. If it raises an error, print the error and exit with its code.

    Of several ranks with the same mistake, rank 0 prints it.
    """
    try:
        return main()
    except DistgptError as error:
        if "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_ZERO_SECONDS)  # if rank 0 has the error too, torchrun ends this rank during this wait
        print_cause(f"distgpt: error: {error}")
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit:
        raise
    except OSError as error:
        reader_left = isinstance(error, BrokenPipeError)  # as with `| head`
        if not reader_left and error.errno not in DISK_FULL:
            traceback.print_exc()
            sys.exit(EXIT_BUG)
        if not reader_left:
            print(f"distgpt: error: cannot write: {error.strerror}", file=sys.stderr, flush=True)
        # Redirect stdout: otherwise the interpreter's last flush prints another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_IO)
    except BaseException:  # a panic of a library in Rust is no Exception
        traceback.print_exc()
        sys.exit(EXIT_BUG)


class Command(NamedTuple):
    """A command: its line in `distgpt --help`, and what parses its options; None: the command does."""

    about: str
    options: Callable[[Sequence[str]], tuple[Any, ...]] | None


# In the order in which they are needed. A new command is a line here, and the file of its name.
COMMANDS: dict[str, Command] = {
    "plan": Command("what a run will take: memory, time, cost, and the best layout", plan_options),
    "prepare": Command("text to tokens", None),
    "doctor": Command("check that machine, data and run directory are fit to train", doctor_options),
    "train": Command("train, or go on; one process, or any number under torchrun", train_options),
    "launch": Command("train on all devices here, on several hosts, or one run after another", None),
    "runs": Command("list runs, and what each is doing", runs_options),
    "evaluate": Command("the loss of a checkpoint, or its accuracy on a task", evaluate_options),
    "sample": Command("write text", sample_options),
    "report": Command("show runs in one HTML page", report_options),
    "export": Command("write a model for other programs", export_options),
    "replay": Command("compute a step again, and find the first layer where it is not finite", replay_options),
    "verify": Command("prove that the checkpoints of a run are what they claim to be", verify_options),
    "completion": Command("complete commands, presets and keys in bash or zsh", completion_options),
}
