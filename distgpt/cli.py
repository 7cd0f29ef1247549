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
from types import FrameType
from typing import Any, NoReturn, TypeVar

from distgpt.checkpoint.choice import add_option
from distgpt.config import Config, config_from_command_line
from distgpt.errors import DISK_FULL, EXIT_BUG, EXIT_INTERRUPTED, EXIT_IO, STOP_SIGNALS, DistgptError, UsageError
from distgpt.files import user_path
from distgpt.run.exit_report import exit_if_restart_cannot_help
from distgpt.run.paths import RunPaths
from distgpt.torchrun import RANK_ZERO_SECONDS, die_with_agent, place_in_job, print_cause

T = TypeVar("T")

DISTRIBUTED_FLAG = "--distributed"
TRAIN_ABOUT = "Train a GPT on a prepared corpus, or go on with the run in its run directory."


def run(command: str) -> NoReturn:
    """Run `distgpt.COMMAND` to its end: parse the options, then import the module and call its main()."""
    prepare_process()
    arguments = main_guard(lambda: OPTIONS[command](sys.argv[1:]))
    module = importlib.import_module(f"distgpt.{command}")
    sys.exit(main_guard(lambda: module.main(*arguments)))


def train_options(arguments: Sequence[str]) -> tuple[Config]:
    """Read the config of a run, and make this rank die with its torchrun. Raises UsageError."""
    die_with_agent()
    config = config_from_command_line(arguments, prog="distgpt.train", about=TRAIN_ABOUT)
    place_in_job()
    exit_if_restart_cannot_help(RunPaths(config.run_dir))
    return (config,)


def doctor_options(arguments: Sequence[str]) -> tuple[Config, bool]:
    """Read the config and --distributed. Raises UsageError."""
    distributed = DISTRIBUTED_FLAG in arguments
    about = (
        "Check that this machine, the data and the run directory are fit to train, and print the fix where not.\n"
        f"{DISTRIBUTED_FLAG}, under torchrun: also check that all hosts fit together, and name a slow link or host."
    )
    config_arguments = [argument for argument in arguments if argument != DISTRIBUTED_FLAG]
    config = config_from_command_line(config_arguments, prog="distgpt.doctor", about=about)
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if distributed and not under_torchrun:
        torchrun = f"torchrun --nproc_per_node=2 -m distgpt.doctor {DISTRIBUTED_FLAG}"
        raise UsageError(f"{DISTRIBUTED_FLAG} needs torchrun: {torchrun}")
    if under_torchrun and not distributed:
        raise UsageError(f"under torchrun, add {DISTRIBUTED_FLAG}")
    return config, distributed


def evaluate_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.evaluate. Raises UsageError."""
    parser = Parser(prog="python -m distgpt.evaluate", description="Print the validation loss of a checkpoint.")
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    add_option(parser, default="the newest good one")
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared data (default: the run's own)")
    parser.add_argument("--sequences", type=int, metavar="N", help="validation windows (default: all)")
    options = parser.parse_args(arguments)
    if options.sequences is not None and options.sequences < 1:
        parser.error(f"--sequences is {options.sequences}: it must be positive")
    return (options,)


def sample_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.sample. Raises UsageError."""
    parser = Parser(prog="python -m distgpt.sample", description="Write text with a trained model.")
    parser.add_argument("run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it")
    add_option(parser, default="the newest good one")
    parser.add_argument("--prompt", default="", help="text to go on from (default: none)")
    parser.add_argument("--tokens", type=int, default=500, metavar="N", help="tokens to write (default: 500)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="texts to write (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0: from all (default: 0)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens whose probabilities reach P (default: 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed writes the same text (default: 0)"
    )
    options = parser.parse_args(arguments)
    for name in ("tokens", "top_k"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}: it cannot be negative")
    if not 0 <= options.temperature < math.inf:
        parser.error(f"--temperature is {options.temperature}: it must be 0 (greedy) or a positive number")
    if not 0 < options.top_p <= 1:
        parser.error(f"--top-p is {options.top_p}: it must be above 0 and at most 1")
    if options.samples < 1:
        parser.error(f"--samples is {options.samples}: it must be positive")
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed}: it must lie between 0 and 2^63")
    return (options,)


def replay_options(arguments: Sequence[str]) -> tuple[argparse.Namespace]:
    """Parse the options of distgpt.replay. Raises UsageError."""
    parser = Parser(
        prog="python -m distgpt.replay",
        description="Compute a step of a run again, and name the first layer whose values are not finite.",
    )
    parser.add_argument(
        "run", type=user_path, metavar="RUN", help="run directory, or one checkpoint of it to start from"
    )
    add_option(parser, default="the newest good one before S")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="the step, as numbered in metrics.jsonl")
    parser.add_argument("--data", type=user_path, metavar="DIR", help="prepared data (default: the run's own)")
    return (parser.parse_args(arguments),)


def prepare_process() -> None:
    """Let a signal to stop end this process silently, and print "?" for characters that stdout cannot encode.

    Lets CUDA's allocator grow its segments, so that blocks of other sizes leave no gaps. torch reads this as it starts.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and so must we
            signal.signal(number, _leave_interrupted)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _leave_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    # No exception: an import under way would print it, or go on without the module.
    os._exit(EXIT_INTERRUPTED)


def main_guard(main: Callable[[], T]) -> T:
    """Return `main()`. If it raises, print the error and exit with its code; rank 0 prints if it has the same error."""
    try:
        return main()
    except DistgptError as error:
        if "MASTER_ADDR" in os.environ and os.environ.get("RANK", "0") != "0":
            time.sleep(RANK_ZERO_SECONDS)  # torchrun ends this rank meanwhile, unless no other rank has the error
        print_cause(f"distgpt: error: {error}")
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader has left (`| head`). Redirect stdout, or the last flush of the interpreter prints an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_IO)
    except OSError as error:
        if error.errno not in DISK_FULL:
            traceback.print_exc()
            sys.exit(EXIT_BUG)
        print(f"distgpt: error: cannot write: {error.strerror}", file=sys.stderr, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_IO)
    except Exception:
        traceback.print_exc()
        sys.exit(EXIT_BUG)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a UsageError for a wrong option, so that it is printed on one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (--help shows the options)")


OPTIONS: dict[str, Callable[[Sequence[str]], tuple[Any, ...]]] = {
    "train": train_options,
    "doctor": doctor_options,
    "evaluate": evaluate_options,
    "sample": sample_options,
    "replay": replay_options,
}
