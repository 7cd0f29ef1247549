"""The equivalence matrix: the same steps with every strategy, number of ranks, accumulation, data type and optimizer.

    python bench/equivalence.py matrix|exact [--steps 20]

matrix prints how far losses and gradient norms lie from those of one process, as docs/equivalence.md does. exact prints
the SHA-256 of the weights with parallel.reduction=exact, of which there must be one for each data type and optimizer.
The ranks are processes of this machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from tests.end_to_end.equivalence import (  # noqa: E402
    ALL,
    EXACT,
    Process,
    deviations,
    exact_table,
    table,
    trained,
    with_references,
)


def start(command: Sequence[str], rank: int, output: int) -> Process:
    """Start the process of a rank."""
    variables = {**os.environ, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=PROJECT, env=variables, stdout=output, stderr=output)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare what every topology learns.")
    parser.add_argument("part", choices=["matrix", "exact"])
    parser.add_argument("--steps", type=int, default=20, help="steps that are compared (default: 20)")
    arguments = parser.parse_args()
    exact = arguments.part == "exact"
    cells = with_references(EXACT if exact else ALL)
    with tempfile.TemporaryDirectory() as directory:
        outcomes = trained(cells, arguments.steps, Path(directory), start=start)
    print(exact_table(outcomes) if exact else table(deviations(outcomes)))


if __name__ == "__main__":
    main()
