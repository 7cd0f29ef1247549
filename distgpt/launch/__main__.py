"""Launch a job: `python -m distgpt.launch local|nodes [PRESET] [--section.key=value ...]`, or `sweep FILE ...`.

The scripts call two more: `slurm ...` makes the decisions of slurm/, and `directory OPTION ...` prints the run
directory that these options give.
"""

import os
import sys

from distgpt.cli import main_guard, prepare_process
from distgpt.config import resolve
from distgpt.errors import UsageError
from distgpt.launch import local, multinode, sweep

OPTIONS_THAT_ONLY_PRINT = {"--help", "-h", "--print-config"}


def main(arguments: list[str]) -> int:
    """Run the launcher that is named first; return its exit code."""
    name, options = arguments[0] if arguments else "", arguments[1:]
    if name in ("local", "nodes") and OPTIONS_THAT_ONLY_PRINT & set(options):
        os.execv(sys.executable, [sys.executable, "-m", "distgpt.train", *options])
    match name:
        case "local":
            return local.main(options)
        case "nodes":
            return multinode.main(options)
        case "sweep":
            return sweep.main(options)
        case "slurm":
            from distgpt.launch import slurm  # imports numpy, which takes time

            return slurm.main(options)
        case "directory":
            print(resolve(options, os.environ).run_dir)
            return 0
    raise UsageError("usage: python -m distgpt.launch local|nodes|sweep [FILE] [PRESET] [--section.key=value ...]")


if __name__ == "__main__":
    prepare_process()
    sys.exit(main_guard(lambda: main(sys.argv[1:])))
