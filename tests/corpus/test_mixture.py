"""Several datasets, mixed by weight."""

import dataclasses
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from distgpt.corpus.loader import EvaluationBatches, Loader
from distgpt.corpus.mixture import open_data
from distgpt.corpus.shard_writer import Documents, write_dataset
from distgpt.corpus.shards import Dataset, verify_dataset
from distgpt.corpus.tokenizer.simple import CharTokenizer
from distgpt.errors import DataError, UsageError
from tests.datasets import ALPHABET

T = 16


@pytest.fixture
def mix(dataset: Dataset, other_dataset: Dataset) -> Dataset:
    return open_data(f"{dataset.path}:3,{other_dataset.path}:1")


def loader(dataset: Dataset, *, rank: int = 0, world_size: int = 1, start_step: int = 0) -> Loader:
    return Loader(
        dataset.train,
        block_size=T,
        global_batch=8,
        micro_batch=2,
        rank=rank,
        world_size=world_size,
        seed=7,
        device=torch.device("cpu"),
        start_step=start_step,
    )


def inputs(dataset: Dataset, steps: int, **options: int) -> list[list[int]]:
    """Return the input of each sequence, step by step."""
    with closing(loader(dataset, **options)) as batches:
        return [row for _ in range(steps) for x, _ in batches.next_step() for row in x.tolist()]


def test_the_sequences_of_a_mix_are_those_of_its_datasets_by_weight(
    mix: Dataset, dataset: Dataset, other_dataset: Dataset
) -> None:
    own, others = inputs(dataset, 60), inputs(other_dataset, 20)
    assert Counter(map(tuple, inputs(mix, 80))) == Counter(map(tuple, own + others))


def test_the_order_of_a_mix_is_the_same_for_any_ranks_and_first_step(mix: Dataset) -> None:
    whole = inputs(mix, 9)
    halves = [inputs(mix, 9, rank=rank, world_size=2) for rank in (0, 1)]
    assert [row for step in range(9) for half in halves for row in half[4 * step : 4 * step + 4]] == whole
    assert inputs(mix, 4, start_step=5) == whole[40:]


def test_each_dataset_has_its_share_of_the_validation_windows(mix: Dataset, dataset: Dataset) -> None:
    batches = EvaluationBatches(
        mix.val, block_size=T, sequences=12, micro_batch=5, rank=0, world_size=1, device=torch.device("cpu")
    )
    assert [(windows, part.share) for windows, part in batches.parts] == [(slice(0, 9), 0.75), (slice(9, 12), 0.25)]
    x = torch.cat([x for _, x, _ in batches])
    assert x[0].tolist() == dataset.val.shards[0][:T].tolist()
    assert x[9].tolist() == mix.mixed[1].val.shards[0][:T].tolist()


def test_a_mix_is_identified_by_its_data_and_shares(mix: Dataset, dataset: Dataset, other_dataset: Dataset) -> None:
    a, b = dataset.path, other_dataset.path
    assert (mix.train.tokens, mix.vocab_size, mix.path) == (8000, dataset.vocab_size, a)
    assert str(mix) == f"{a}:0.75,{b}:0.25"
    assert open_data(str(mix)).fingerprint == mix.fingerprint
    assert open_data(f"{a}:1,{b}:1").fingerprint != mix.fingerprint
    assert open_data(str(a)).fingerprint == dataset.fingerprint
    verify_dataset(mix, always=True)


def test_datasets_that_do_not_fit_together_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    a = dataset.path
    other = tmp_path / "other"
    other.mkdir()
    tokens = np.array([5, 6, 7], dtype=np.uint16)
    write_dataset(
        other,
        [Documents(name, tokens, np.array([3])) for name in ("train", "val")],
        tokenizer=CharTokenizer(sorted(ALPHABET + "q#"), end_of_text=False),
        eot_id=None,
        shard_tokens=None,
        about={},
        advance=lambda written: None,
    )
    for data_path, words in {
        f"{a}:1,{other}:1": (
            f"{other} has another tokenizer than {a} (the tokenizer has 31 ids there and 32 in {other}; "
            f"token 2 is b'a' there and b'#' in {other}): prepare it again with --tokenizer {a}"
        ),
        f"{a}:1,{a}/:2": f"{a} and {a} are the same data: name it once",
        f"{a},{other}": f"no data in {a},{other}: to mix several, give each a weight, as in",
        f"{a}:0.5,{other}:0": f"data.path: the weight of {other} is 0: it must be above 0",
    }.items():
        with pytest.raises(UsageError) as caught:
            open_data(data_path)
        assert str(caught.value).startswith(words)


def test_a_dataset_of_a_mix_that_holds_no_window_is_named(mix: Dataset, other_dataset: Dataset) -> None:
    lengths = (*mix.train.mix[:1], dataclasses.replace(mix.train.mix[1], lengths=(9,)))
    short = dataclasses.replace(mix, train=dataclasses.replace(mix.train, mix=lengths))
    with pytest.raises(DataError, match=f"^the train split of {other_dataset.path} has 9 tokens, and one window"):
        loader(short)
