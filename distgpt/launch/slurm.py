"""Answers for slurm/train.sh, which runs outside of a container and asks Python inside of it.

python -m distgpt.launch slurm flags FILE TASK      the flags in the line of an array task, each ended by NUL
python -m distgpt.launch slurm plan OPTION...       steps and run directory of a run whose config and data are good
python -m distgpt.launch slurm ending REPORT        exit code, step and cause in an exit report
"""

import itertools
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from distgpt.config import resolve
from distgpt.corpus.shards import open_dataset
from distgpt.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """Print one answer. Raises UsageError and DataError as the job would."""
    match arguments:
        case ["flags", file, task]:
            print(*flags_of_task(Path(file), int(task)), sep="\0", end="\0")
        case ["plan", *options]:
            config = resolve(options, os.environ)
            open_dataset(Path(config.data.path))
            print(config.train.steps, config.run_dir)
        case ["ending", report]:
            values = json.loads(Path(report).read_text())
            print(values["code"], values.get("step") or 0, *str(values["cause"]).split())
        case _:
            raise UsageError(f"slurm {' '.join(arguments)[:80]}: expected flags, plan or ending")
    return 0


def flags_of_task(sweep: Path, task: int) -> list[str]:
    """Read the line of an array task, from 0, with quotes as in a shell. Raises UsageError if it has no flags."""
    why: object = "no flags"
    try:
        with sweep.open(encoding="utf-8-sig") as file:
            if flags := shlex.split(next(itertools.islice(file, task, None), "")):
                return flags
    except (OSError, ValueError) as error:
        why = error
    raise UsageError(f"DISTGPT_SWEEP={sweep}: {why} in line {task + 1}, that of task {task} (from 0)")
