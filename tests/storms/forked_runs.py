"""The client of fork_server.py: starts small runs for a test."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgpt.corpus.shards import Dataset
from tests import jobs
from tests.forking import client


@dataclass(frozen=True)
class Ended:
    """A run that has ended or is stopped. `step` and `digest`: where it resumed, and its weights there."""

    code: int
    stopped: bool
    step: int | None
    digest: str | None
    calls: list[str]


class ForkedRuns:
    """Starts fork_server.py and sends it requests."""

    def __init__(self, dataset: Dataset, scratch: Path) -> None:
        command = [sys.executable, "-m", "tests.storms.fork_server", str(dataset.path)]
        self._scratch = scratch
        (theirs, requests), (answers, stdout) = os.pipe(), os.pipe()
        variables = jobs.environment(PYTHONPATH=str(jobs.PROJECT))
        self._process = client.start(command, env=variables, streams=(theirs, stdout, 2))
        os.close(theirs)
        os.close(stdout)
        self._requests, self._answers = open(requests, "w"), open(answers)  # noqa: SIM115 (until close)

    def run(
        self, directory: Path, how: str = "run", at: int = 0, *, boot: str = "", world: int = 1, rank: int = 0
    ) -> Ended:
        """Run `world` ranks to the end, or until `rank` is killed or stopped just before its call number `at`, from 1.

        `how`: "run", "kill", "tear" or "stop", see fork_server.Calls. `boot`: a boot id, as of another host.
        """
        request = {"directory": str(directory), "how": how, "at": at, "boot": boot, "world": world, "rank": rank}
        return self._ask({**request, "scratch": str(self._scratch)})

    def wake(self) -> Ended:
        """Continue the stopped run to its end."""
        return self._ask({"wake": True})

    def close(self) -> None:
        self._requests.close()
        self._process.wait()
        self._answers.close()

    def _ask(self, request: dict[str, Any]) -> Ended:
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        return Ended(**json.loads(self._answers.readline()))
