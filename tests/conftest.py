"""Fixtures and options of all tests. jobs.py starts processes; workers.py has the order in which tests run."""

import os
import random
import signal
import string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the workers share the cores, and tensors are small

from tests import jobs
from tests.once import made_once

if TYPE_CHECKING:
    from distgpt.corpus.shards import Dataset
    from distgpt.distributed.runtime import Runtime

pytest_plugins = ["tests.timing", "tests.workers"]
SHAKESPEARE = jobs.PROJECT.parent / "shared" / "data" / "tinyshakespeare.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--storms", action="store_true", help="run the storms (tests/storms) at their full length")
    parser.addoption(
        "--storm-seed", type=int, default=1, help="seed of the random kills and damage of a storm (default: 1)"
    )


def pytest_configure() -> None:
    """Restore signals that are ignored in the background of a script or under nohup, for the jobs of the tests."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


# The tests of launch/test.sh --fast: they start no training and wait for nothing.
FAST = (
    *("model/", "corpus/", "distributed/", "run/", "checkpoint/", "health/", "telemetry/", "training/", "preflight/"),
    *("weights/", "planning/", "reporting/", "test_config.py", "test_cli.py", "test_usage.py", "test_presets.py"),
    *("launch/test_policy.py", "launch/test_slurm.py"),
)
NOT_FAST = ("health/test_watchdog.py", "training/test_evaluation.py", "run/test_lock.py", "corpus/test_workers.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        inside = item.nodeid.split("::")[0].removeprefix("tests/")
        if not inside.startswith(FAST) or inside.startswith(NOT_FAST):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of tinyshakespeare if it is here, else a text of 200,000 made-up words."""
    if SHAKESPEARE.exists():
        return SHAKESPEARE
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(200_000)]
    path.write_text(" ".join([string.ascii_letters, *words, "\n"]))
    return path


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as a char-level dataset."""

    def prepare(directory: Path) -> None:
        done = jobs.command("prepare", "--input", corpus, "--output", directory, "--tokenizer", "char")
        assert done.code == 0, done

    return made_once(tmp_path_factory, "corpus", prepare)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> "Dataset":
    """Random characters, some of two bytes: 4,000 tokens for training and 1,001 for validation."""
    from tests.datasets import make_dataset

    return make_dataset(tmp_path_factory.mktemp("random"), seed=0)


@pytest.fixture(scope="session")
def other_dataset(tmp_path_factory: pytest.TempPathFactory) -> "Dataset":
    """The same with other text."""
    from tests.datasets import make_dataset

    return make_dataset(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def one_process() -> "Runtime":
    import torch

    from distgpt.distributed.runtime import Runtime

    return Runtime(0, 0, 1, 1, torch.device("cpu"))
