"""For the PYTHONPATH of jobs under test: while there is a RUN/slow, each checkpoint of RUN takes seconds to commit.

So a job that saves after each step does not end before a host has joined it, however slow the machine. Python imports
only the first sitecustomize of the path: this one imports that of tests/forking/hook.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import tests.forking.hook.sitecustomize  # noqa: F401

# A rank that is told to end may still commit three times. For a restart, torchrun kills it after 30 seconds.
SECONDS = 4.0


def _delay(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename":
        committed = Path(os.fsdecode(arguments[1]))
        if committed.parent.name == "checkpoints" and (committed.parents[1] / "slow").exists():
            time.sleep(SECONDS)


# Once in a process: a forked rank has the hook of its launcher, and runs this module again.
if not hasattr(sys, "slow_commits"):
    sys.slow_commits = True  # type: ignore[attr-defined]
    sys.addaudithook(_delay)
