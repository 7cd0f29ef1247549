"""What several tests share: a corpus, its prepared directory, and real processes under torchrun."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SHAKESPEARE = PROJECT.parent / "shared" / "data" / "tinyshakespeare.txt"

# A model that takes milliseconds a step.
TINY = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=32", "--model.block_size=32", "--model.dropout=0.1"),
    *("--train.global_batch=16", "--train.micro_batch=4", "--train.steps=20", "--optim.lr=1e-3"),
    *("--eval.every=10", "--eval.sequences=30", "--eval.sample_tokens=20", "--checkpoint.every=10", "--log.every=1"),
    "--health.timeout=60",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tinyshakespeare where it is, else a text of 200,000 made-up words."""
    if SHAKESPEARE.exists():
        return SHAKESPEARE
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(200_000)]
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, char-level."""
    directory = tmp_path_factory.mktemp("data") / "corpus"
    done = door("prepare", "--input", str(corpus), "--output", str(directory), "--tokenizer", "char")
    assert done.returncode == 0, done.stderr
    return directory


def door(name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m distgpt.<name>` to its end."""
    command = [sys.executable, "-m", f"distgpt.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, **options)


def torchrun_command(ranks: int, arguments: Sequence[str]) -> list[str]:
    """The command line of a training job, with its own rendezvous."""
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", signals]
    return [*launcher, "-m", "distgpt.train", *arguments]


def train(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Train to the end, under torchrun or, with no ranks, as a plain process."""
    command = torchrun_command(ranks, arguments) if ranks else [sys.executable, "-m", "distgpt.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


def environment() -> dict[str, str]:
    """This one, with a thread a rank, so that tests do not fight over cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def exit_report(run: Path) -> dict[str, Any]:
    """exit.json."""
    report: dict[str, Any] = json.loads((run / "exit.json").read_text())
    return report
