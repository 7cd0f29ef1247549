"""Settings of a launcher from the environment, checked before anything starts. Imports no torch."""

import math
import os
import re
from pathlib import Path

from distgpt.config import Config
from distgpt.errors import UsageError
from distgpt.run.exit_report import EXIT_FILE_VARIABLE

# torchrun passes on only the signals that it is told of, and SIGUSR1 would kill it.
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
WITH_FILE_STORE = "store_type=file,keep_alive_interval=3600"  # each keep-alive makes the file longer


def count(name: str) -> int | None:
    """Return the whole number in an environment variable, None where it is not set. Raises UsageError."""
    text = os.environ.get(name)
    if not text:
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise UsageError(f"{name}={text}: it must be a whole number from 1")
    return int(text)


def with_defaults(**defaults: object) -> dict[str, str]:
    """Return these variables with the values that the environment has for them, or else these."""
    return {name: os.environ.get(name) or str(value) for name, value in defaults.items()}


def require_divisible_batch(config: Config, *, ranks: int, nodes: range = range(1, 2), named: str = "") -> None:
    """Raise UsageError if the global batch does not divide over `ranks` a node, for each number of nodes.

    `named`: the setting that gave the number of nodes, as the user wrote it.
    """
    batch, micro_batch = config.train.global_batch, config.train.micro_batch
    for number in nodes:
        if batch % (number * ranks * max(1, micro_batch)):
            over = f"{number} hosts x {ranks} ranks" if named else f"{ranks} ranks"
            over += f" x train.micro_batch {micro_batch}" if micro_batch else ""
            step = math.lcm(*nodes) * ranks * max(1, micro_batch)
            fits = f", which divides for {named}" if named else ", or set NPROC_PER_NODE to other ranks"
            raise UsageError(f"train.global_batch {batch} does not divide over {over}: take a multiple of {step}{fits}")


def torchrun_environment(report: Path, *, shutdown_seconds: int, **defaults: str) -> dict[str, str]:
    """Return the environment of a torchrun whose ranks say in `report` how they ended, with these defaults.

    `shutdown_seconds`: the time that ranks have to save once they are told to stop; 30 by default.
    """
    return {
        **os.environ,
        # Each rank sets its own share of the threads; this only keeps torchrun from warning about it.
        **with_defaults(OMP_NUM_THREADS=1, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=shutdown_seconds, **defaults),
        EXIT_FILE_VARIABLE: str(report),
        # Ranks that torchrun starts again get a store of their own: in that of before, gloo would find stale addresses.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
