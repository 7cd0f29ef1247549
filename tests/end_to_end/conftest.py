"""Runs that were never interrupted, to compare others with; each is trained once and only where a test asks for it."""

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests import jobs

RANKS = {"single": 1, "ddp": 2, "ddp4": 4, "fsdp": 2, "hsdp": 4, "diloco": 4}
# "single" is one process, whatever it is asked for. Two ways to save, so that each is compared with the other.
ARGUMENTS = {
    "single": (),
    "ddp": ("--parallel.strategy=ddp", "--checkpoint.async_save=false", "--checkpoint.keep=1"),
    "ddp4": ("--parallel.strategy=ddp",),
    "fsdp": ("--parallel.strategy=fsdp",),
    "hsdp": ("--parallel.strategy=hsdp", "--parallel.shard=2"),
    "diloco": ("--parallel.strategy=diloco", "--parallel.shard=2", "--parallel.outer_every=10"),
}


@dataclass(frozen=True)
class Trained:
    """A run directory and how its job ended."""

    run: Path
    ended: jobs.Ended

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / "step-00000060"


@pytest.fixture(scope="session")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """60 steps of jobs.TINY without a break, with dropout: whole("fsdp"). Do not change these directories."""
    base = tmp_path_factory.getbasetemp()
    # The workers of one test run have directories side by side, and what one has trained serves all.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole"
    root.mkdir(exist_ok=True)

    def trained(strategy: str) -> Trained:
        told = root / f"{strategy}.json"
        with (root / f"{strategy}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not told.exists():
                arguments = [*tiny(prepared, root / strategy), *ARGUMENTS[strategy]]
                ended = jobs.train(RANKS[strategy], *arguments)
                assert ended.code == 0, ended
                told.write_text(json.dumps(asdict(ended)))
        return Trained(root / strategy, jobs.Ended(**json.loads(told.read_text())))

    return trained


def tiny(data: Path, run: Path) -> list[str]:
    """The arguments of a small run."""
    return [*jobs.TINY, f"--data.path={data}", f"--run.dir={run}"]
