"""Start a job and keep it going: `python -m distgpt.launch local|nodes [PRESET] [--section.key=value ...]`."""

import sys

from distgpt.cli import TRAIN_ABOUT, main_guard
from distgpt.config import config_from_command_line
from distgpt.errors import UsageError
from distgpt.launch import local, nodes, slurm

LAUNCHERS = {"local": local.launch, "nodes": nodes.launch}


def main() -> int:
    """Launch a job and return its exit code. Raises UsageError before anything starts."""
    match sys.argv[1:]:
        case ["slurm", *arguments]:
            return slurm.main(arguments)
        case [name, *arguments] if name in LAUNCHERS:
            # --help and --print-config answer here, as does a mistake.
            config = config_from_command_line(arguments, prog="distgpt.train", about=TRAIN_ABOUT)
            return LAUNCHERS[name](config, arguments)
    raise UsageError(f"usage: python -m distgpt.launch {'|'.join(LAUNCHERS)} [PRESET] [--section.key=value ...]")


if __name__ == "__main__":
    sys.exit(main_guard(main))
