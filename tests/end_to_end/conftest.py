"""Uninterrupted runs to compare others with. Each is trained once, when a test asks for it."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests import jobs
from tests.once import made_once

RANKS = {"single": 1, "ddp": 2, "fsdp": 2, "hsdp": 4, "diloco": 2}
# "single" is one process. Two ways to save, and to use memory, so that each is compared with the other.
ARGUMENTS = {
    "single": (),
    "ddp": ("--parallel.strategy=ddp", "--checkpoint.async_save=false", "--checkpoint.keep=1"),
    "fsdp": ("--parallel.strategy=fsdp",),
    "hsdp": (
        *("--parallel.strategy=hsdp", "--parallel.shard=2"),
        *("--parallel.reshard=true", "--parallel.reduce=micro_batch"),  # where memory is short
    ),
    "diloco": ("--parallel.strategy=diloco", "--parallel.shard=1", "--parallel.outer_every=6"),
}


@dataclass(frozen=True)
class Trained:
    """A run directory and how its job ended."""

    run: Path
    ended: jobs.Ended

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / "step-00000036"


@pytest.fixture(scope="session")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Train 36 uninterrupted steps of jobs.TINY, with dropout: whole("fsdp"). Do not change these directories."""

    def trained(strategy: str) -> Trained:
        def train(root: Path) -> None:
            ended = jobs.train(RANKS[strategy], *tiny(prepared, root / "run"), *ARGUMENTS[strategy])
            assert ended.code == 0, ended
            (root / "ended.json").write_text(json.dumps(asdict(ended)))

        root = made_once(tmp_path_factory, f"whole-{strategy}", train)
        return Trained(root / "run", jobs.Ended(**json.loads((root / "ended.json").read_text())))

    return trained


def tiny(data: Path, run: Path) -> list[str]:
    """The arguments of a small run."""
    return [*jobs.TINY, f"--data.path={data}", f"--run.dir={run}"]
