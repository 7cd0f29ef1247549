"""A storm strikes at random moments: a kill, a signal or damage. Here are its length, seed, and tables of results."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from distgpt.corpus.shards import Dataset
from tests.datasets import make_dataset
from tests.once import made_once
from tests.storms.forked_runs import ForkedRuns
from tests.storms.local_run import STEPS_A_STRIKE, LocalRun

Table = Callable[..., None]


@dataclass(frozen=True)
class Storm:
    """The options --storms (`full`) and --storm-seed."""

    full: bool
    seed: int

    def size(self, *, short: int, long: int) -> int:
        """Return the number of strikes: `long` with --storms, else `short`."""
        return long if self.full else short

    def steps(self, count: int) -> int:
        """Return the steps of a run that is long enough for `count` strikes. Short storms share one length."""
        return STEPS_A_STRIKE * (count if self.full else max(count, 3))


@pytest.fixture(scope="session")
def storm(request: pytest.FixtureRequest) -> Storm:
    return Storm(request.config.getoption("--storms"), request.config.getoption("--storm-seed"))


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """A function that adds a row to a table, printed at the end: table("Title", {"column": value, ...})."""
    # User properties are passed from the workers to the terminal summary.
    return lambda title, row: request.node.user_properties.append((title, row))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the tables in the format of bench/RESULTS.md."""
    tables: dict[str, list[dict[str, object]]] = {}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call":
            for title, row in report.user_properties:
                tables.setdefault(title, []).append(row)
    for title, rows in tables.items():
        terminalreporter.section(f"{title}, seed {config.getoption('--storm-seed')}")
        terminalreporter.write_line(f"| {' | '.join(rows[0])} |")
        terminalreporter.write_line(f"|{'---|' * len(rows[0])}")
        for row in rows:
            terminalreporter.write_line(f"| {' | '.join(map(str, row.values()))} |")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("storm-data"), seed=0)


@pytest.fixture(scope="session")
def forked_runs(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    started = ForkedRuns(dataset, tmp_path_factory.mktemp("forked-runs"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A function of a number of steps: trains so many under launch/local.sh, undisturbed, and returns the directory."""

    def trained(steps: int) -> Path:
        def train(directory: Path) -> None:
            directory.mkdir()
            job = LocalRun(directory / "run", prepared, f"--train.steps={steps}")
            assert job.code() == 0, job.output()

        return made_once(tmp_path_factory, f"undisturbed-{steps}", train) / "run"

    return trained
