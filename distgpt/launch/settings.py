"""Settings of launchers in the environment, checked before anything starts."""

import os
import re
from pathlib import Path

from distgpt.errors import UsageError
from distgpt.run.exit_report import EXIT_FILE_VARIABLE

# torchrun passes on only the signals that it is told of, and SIGUSR1 would kill it.
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
FILE_STORE_CONF = "store_type=file,keep_alive_interval=3600"  # each keep-alive makes the file longer


def count_from_environment(name: str) -> int | None:
    """Return the whole number in an environment variable, None where it is not set. Raises UsageError."""
    text = os.environ.get(name)
    if not text:
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise UsageError(f"{name}={text}: it must be a whole number from 1")
    return int(text)


def with_defaults(**defaults: object) -> dict[str, str]:
    """Return these variables with their values in the environment, or else with these values."""
    return {name: os.environ.get(name) or str(value) for name, value in defaults.items()}


def torchrun_environment(report: Path, *, shutdown_seconds: int, **defaults: str) -> dict[str, str]:
    """Return the environment of a torchrun whose ranks write `report`; `defaults` are for variables that are not set.

    `shutdown_seconds`: the time that ranks have to save once they are told to stop. torchrun's default is 30.
    """
    return {
        **os.environ,
        # Each rank sets its own share of the threads; this only keeps torchrun from warning about it.
        **with_defaults(OMP_NUM_THREADS=1, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=shutdown_seconds, **defaults),
        EXIT_FILE_VARIABLE: str(report),
        # Restarted ranks get a store of their own: gloo would find stale addresses in the store of earlier ones.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
