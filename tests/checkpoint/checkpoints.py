"""Small runs with checkpoints for the tests, and ways to break them."""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.manifest import Origin, committed, find_damage
from distgpt.checkpoint.reader import TrainingState
from distgpt.config import resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.health.outliers import OutlierFilter
from distgpt.model.gpt import GPT
from distgpt.model.optim import build_optimizer
from distgpt.run.lock import Owner
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession
from tests import jobs

SMALL = ("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=8", "--checkpoint.keep=2")
CPU = torch.device("cpu")
ORIGIN = Origin(None, "config", "data", "code", "version", "device", "layout")
FILES = ["__0_0.distcp", ".metadata", "train.json", "tokenizer.json", "manifest.json"]


class OnlyRun(RunSession):
    """A session whose directory no other job can take. It collects its messages."""

    def __init__(self, directory: Path) -> None:
        super().__init__(RunPaths(directory), 0)
        self.owner = Owner(1, "here", "now", 1, "today")
        self.messages: list[str] = []

    def require_owned(self) -> None:
        pass

    def say(self, text: str) -> None:
        self.messages.append(text)


@dataclass
class Trainee:
    """A model that can take steps, with the Checkpointer of its run."""

    model: GPT
    optimizer: torch.optim.Optimizer
    outliers: OutlierFilter
    checkpointer: Checkpointer
    messages: list[str]

    def learn(self) -> None:
        """Take a step, so that weights and moments differ from those of a new model."""
        tokens_BT = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(3))
        self.model(tokens_BT[:, :-1], tokens_BT[:, 1:]).mean().backward()
        self.checkpointer.wait_until_staged()
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainee(run: Path, dataset: Dataset, *arguments: str) -> Trainee:
    config = resolve([*SMALL, *arguments], {})
    plan = make_plan(config, Runtime(0, 0, 1, 1, CPU), vocab_size=dataset.vocab_size)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=None)
    assert isinstance(model, GPT)
    optimizer = build_optimizer(model, config.optim, "cpu")
    outliers, session = OutlierFilter(config.health), OnlyRun(run)
    checkpointer = Checkpointer(session, config, plan, dataset, TrainingState(model, optimizer, outliers))
    return Trainee(model, optimizer, outliers, checkpointer, session.messages)


def newest(run: Path) -> Path:
    return committed(run / "checkpoints")[0]


def names(run: Path) -> list[str]:
    return jobs.checkpoints(run)


def flip_bit(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def sign_again(directory: Path) -> None:
    """Make the manifest agree with the changed files, as an attacker would."""
    manifest = json.loads((directory / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (directory / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del manifest["sha256"]
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    signed = {**manifest, "sha256": own}
    (directory / "manifest.json").write_text(json.dumps(signed, sort_keys=True, indent=1))
    assert find_damage(directory) == []
