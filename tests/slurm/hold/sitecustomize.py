"""For the PYTHONPATH of jobs under test: RUN/checkpoints/NAME is not committed while there is a RUN/hold-NAME, and
OUTPUT.partial/parts/NAME of a preparation not while there is a hold-NAME beside OUTPUT.

So a test knows how far a job has come, however fast or slow the machine. The sitecustomize of tests/forking/hook comes
after this one in the path, and Python imports only the first: this one imports it where it is in the path.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

# How far above a directory its holds are.
_LEVELS = {"checkpoints": 1, "parts": 2}


def _hold(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "os.rename":
        return
    committed = Path(os.fsdecode(arguments[1]))
    level = _LEVELS.get(committed.parent.name)
    while level and (committed.parents[level] / f"hold-{committed.name}").exists():
        time.sleep(0.02)


sys.addaudithook(_hold)
if any(entry.endswith("tests/forking/hook") for entry in sys.path):
    import tests.forking.hook.sitecustomize  # noqa: F401
