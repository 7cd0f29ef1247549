"""The command `distgpt`, or `python -m distgpt`: `distgpt train ...` is `python -m distgpt.train ...`."""

import runpy
import sys

from distgpt import __version__
from distgpt.cli import COMMANDS, main_guard, prepare_process
from distgpt.errors import UsageError, did_you_mean
from distgpt.usage import Parser


def main() -> None:
    """Run the command that is named first."""
    prepare_process()
    command = main_guard(chosen)
    sys.argv.pop(1)
    runpy.run_module(f"distgpt.{command}", run_name="__main__", alter_sys=True)


def chosen() -> str:
    """Return the command. Prints and exits with 0 for --help and --version. Raises UsageError."""
    parser = Parser(
        prog="distgpt",
        usage="distgpt COMMAND [OPTION ...]",
        description="Train a GPT from scratch on your own text. `distgpt COMMAND --help` has the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"distgpt {__version__}")
    commands = parser.add_argument_group("commands, in the order in which they are needed")
    for name, command in COMMANDS.items():
        commands.add_argument(name, nargs="?", help=command.about)
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name.startswith("-"):
        parser.parse_args(sys.argv[1:2] or ["--help"])
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name}{did_you_mean(name, COMMANDS)} (distgpt --help lists the commands)")
    return name


if __name__ == "__main__":
    main()
