"""A run starts from weights of other programs and of other runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distgpt.checkpoint.reader import load_for_inference
from distgpt.config import Config, resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.model.gpt import GPT
from distgpt.weights.fit import check_initial_weights
from distgpt.weights.initial import load_initial_weights
from distgpt.weights.source import model_of_start
from tests.weights.shapes import SHAPES
from tests.weights.test_export import export

CPU = torch.device("cpu")


def started(config: Config, dataset: Dataset) -> GPT:
    """Return the model of a new run of one process."""
    plan = make_plan(config, Runtime(0, 0, 1, 1, CPU), vocab_size=dataset.vocab_size)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=None)
    check_initial_weights(config, dataset)
    load_initial_weights(config, plan, dataset, model, None)
    assert isinstance(model, GPT)
    return model.eval()


def config_from(source: Path, run: Path, *arguments: str) -> Config:
    return resolve([f"--init.from={source}", f"--run.dir={run}", *arguments], {}, model_of=model_of_start)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_model_comes_back(
    shape: str, run_of: Callable[[str], Path], dataset: Dataset, tmp_path: Path
) -> None:
    """Biases that it did not have are zeros, and any padding of the vocabulary will do."""
    exported = export(run_of(shape), tmp_path / "exported")
    config = config_from(exported, tmp_path / "run", "--model.vocab_multiple=16", "--model.block_size=20")
    model, (former, _, _) = started(config, dataset), load_for_inference(run_of(shape), CPU)
    tokens_BT = torch.randint(0, dataset.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(tokens_BT) - former(tokens_BT)).abs().max() < 1e-6
    assert not model.token_embedding.weight[dataset.vocab_size :].any()
