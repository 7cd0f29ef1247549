"""The validation loss is the mean over its windows, whichever rank computes them."""

import math

import numpy as np
import pytest
import torch

from distgpt.config import resolve
from distgpt.corpus.loader import EvaluationBatches
from distgpt.corpus.shards import Dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import Plan, make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.model.gpt import GPT
from distgpt.training.evaluation import evaluate

SMALL = ("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=20", "--model.dropout=0.5")
WINDOWS = 13


@pytest.fixture
def plan(dataset: Dataset, one_process: Runtime) -> Plan:
    return make_plan(resolve([*SMALL, "--train.dtype=float32"], {}), one_process, vocab_size=dataset.vocab_size)


@pytest.fixture
def model(dataset: Dataset, plan: Plan) -> torch.nn.Module:
    return build_model(resolve(SMALL, {}), plan, vocab_size=dataset.vocab_size, eot_id=None)


def batches(dataset: Dataset, *, rank: int = 0, world_size: int = 1, micro_batch: int = 2) -> EvaluationBatches:
    return EvaluationBatches(
        dataset.val,
        block_size=20,
        sequences=WINDOWS,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
    )


def test_val_loss_is_the_mean_over_windows_and_gives_bits_per_byte(model: GPT, dataset: Dataset, plan: Plan) -> None:
    tokenizer = load_tokenizer(dataset.path)
    found = evaluate(model, batches(dataset), tokenizer, plan)
    losses, text_bytes, seen = [], 0, []
    model.eval()
    for indices, x_BT, y_BT in batches(dataset):
        logits_BTV = model(x_BT)
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten(), reduction="none")
        losses += loss.reshape(y_BT.shape).mean(dim=1).tolist()
        text_bytes += sum(len(tokenizer.decode(row).encode()) for row in y_BT.tolist())
        seen += indices.tolist()
    assert seen == list(range(WINDOWS))
    assert found.val_loss == pytest.approx(np.mean(losses), abs=1e-6)
    assert text_bytes > WINDOWS * 20  # some characters take two bytes
    nats = np.sum(losses) * 20
    assert found.val_bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, abs=1e-6)


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_the_losses_of_several_ranks_sum_to_that_of_one_process(
    model: GPT, dataset: Dataset, plan: Plan, world_size: int
) -> None:
    tokenizer = load_tokenizer(dataset.path)

    def part(rank: int, ranks: int) -> float:
        part_of_rank = batches(dataset, rank=rank, world_size=ranks)
        return evaluate(model, part_of_rank, tokenizer, plan).val_loss

    # Each divides by all windows, so the parts add up.
    assert sum(part(rank, world_size) for rank in range(world_size)) == pytest.approx(part(0, 1), rel=1e-12)


def test_an_evaluation_does_not_change_training(model: GPT, dataset: Dataset, plan: Plan) -> None:
    before = torch.random.get_rng_state()
    evaluate(model, batches(dataset), load_tokenizer(dataset.path), plan)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
