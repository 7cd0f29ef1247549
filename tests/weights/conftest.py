"""Small runs of each architecture, and directories of weights as transformers writes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distgpt.corpus.shards import Dataset
from tests.checkpoint.checkpoints import trainee
from tests.weights.shapes import OTHERS, SHAPES


@pytest.fixture(scope="session")
def run_of(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a run of one of SHAPES or OTHERS, with steps 1 and 2. Do not change these directories."""
    made: dict[str, Path] = {}

    def make(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp("runs") / shape
            subject = trainee(made[shape], dataset, *(SHAPES | OTHERS)[shape])
            draw = torch.Generator().manual_seed(8)
            for step in (1, 2):
                with torch.no_grad():
                    for parameter in subject.model.parameters():  # so that no bias is 0 and no norm is 1
                        parameter.add_(0.15 * torch.randn(parameter.shape, generator=draw))
                subject.checkpointer.save(step, val_loss=3.0 + step)
            subject.checkpointer.require_saved(2)
        return made[shape]

    return make
