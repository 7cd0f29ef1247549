"""Launch a job: `python -m distgpt.launch local|nodes [PRESET] [--section.key=value ...]`, or `sweep FILE ...`.

The scripts call two more: `slurm ...` makes the decisions of slurm/, and `directory OPTION ...` prints the run
directory that these options give.
"""

import os
import sys

from distgpt.cli import main_guard, prepare_process
from distgpt.config import resolve
from distgpt.errors import UsageError, did_you_mean
from distgpt.launch import local, multinode, sweep
from distgpt.usage import Parser

USAGE = "python -m distgpt.launch local|nodes|sweep [FILE] [PRESET] [--section.key=value ...]"
VARIABLES = {
    "NPROC_PER_NODE": "ranks on each host (default: one for each GPU, or two that share the CPU's cores)",
    "NUMA_BINDING": "bind each rank to the CPUs near its GPU: torchrun's --numa-binding, such as node (default: no)",
    "TRIES": "launches in a row without a new checkpoint before giving up (default: local and sweep: 3, nodes: 10)",
    "HEAD": "nodes: HOST:PORT, one of the hosts and a free port on it",
    "NODES": "nodes: the number of hosts, or MIN:MAX",
    "JOIN_SECONDS": "nodes: how long to wait for the other hosts (default: 600)",
}
OPTIONS_THAT_ONLY_PRINT = {"--help", "-h", "--print-config"}


def main(arguments: list[str]) -> int:
    """Run the launcher that is named first; return its exit code."""
    name, options = arguments[0] if arguments else "", arguments[1:]
    if name in ("local", "nodes") and any(option.partition("=")[0] in OPTIONS_THAT_ONLY_PRINT for option in options):
        os.execv(sys.executable, [sys.executable, "-m", "distgpt.train", *options])
    match name:
        case "--help" | "-h":
            print(help_text(), end="")
            return 0
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
    hint = did_you_mean(name, ("local", "nodes", "sweep"))
    raise UsageError(f"usage: {USAGE}{hint}")


def help_text() -> str:
    """Return the text of --help."""
    about = (
        "Train on all devices of this machine (local), on several hosts (nodes), or the lines of a file one after the "
        "other (sweep), and start again after a failure. `local --help` lists the keys."
    )
    parser = Parser(usage=USAGE, description=about, add_help=False)
    variables = parser.add_argument_group("environment variables")
    for name, meaning in VARIABLES.items():
        variables.add_argument(name, help=meaning)
    return parser.format_help()


if __name__ == "__main__":
    prepare_process()
    sys.exit(main_guard(lambda: main(sys.argv[1:])))
