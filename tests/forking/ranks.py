"""Lets torchrun fork its ranks: they have torch from it, and need not import it for each attempt."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from tests.forking import program


class ForkedRank:
    """A rank as a fork of this process, with what torchrun uses of a Popen."""

    def __init__(self, args: Sequence[str], *, env: Mapping[str, str], stdout: Any, stderr: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()
            for number, stream in ((1, stdout), (2, stderr)):
                if stream is not None:
                    os.dup2(stream.fileno(), number)
            program.run(args, env=env, cwd=os.getcwd())
        finally:
            os._exit(70)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return code


def _start(args: Sequence[str], *, env: Mapping[str, str], stdout: Any, stderr: Any, start_new_session: bool) -> Any:
    """Stand for Popen in torchrun."""
    if not program.is_python(args):
        return subprocess.Popen(args, env=env, stdout=stdout, stderr=stderr, start_new_session=start_new_session)
    if program.COMPILER not in sys.modules and "distgpt.train" in args:  # this torchrun was not forked by the server
        program.import_packages([program.COMPILER])
    return ForkedRank(args, env=env, stdout=stdout, stderr=stderr)


def fork_ranks() -> None:
    """Have the torchrun of this process fork the ranks that it starts."""
    subprocess_handler.Popen = _start  # type: ignore[assignment, misc]
