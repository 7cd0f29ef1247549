"""Settings of launchers in the environment, checked before anything starts."""

import os
import re
from collections.abc import Mapping

from distgpt.errors import UsageError

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
    """Return these variables with their values in the environment, or else with these values."""
    return {name: os.environ.get(name) or str(value) for name, value in defaults.items()}


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `variables` for torchrun.

    Each rank sets its own share of the threads; OMP_NUM_THREADS only keeps torchrun from warning about it.
    """
    return {**os.environ, **with_defaults(OMP_NUM_THREADS=1), **variables}
