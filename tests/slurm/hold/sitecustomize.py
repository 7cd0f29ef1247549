"""For the PYTHONPATH of ranks under test: RUN/checkpoints/NAME is not committed while there is a RUN/hold-NAME.

So a test knows what step a run is at, however fast or slow the machine.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any


def _hold(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "os.rename":
        return
    committed = Path(os.fsdecode(arguments[1]))
    while committed.parent.name == "checkpoints" and (committed.parent.parent / f"hold-{committed.name}").exists():
        time.sleep(0.02)


sys.addaudithook(_hold)
