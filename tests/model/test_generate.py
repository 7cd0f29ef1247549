"""Sampling: the context rule, truncation, seeds, batches, and sharded models."""

import math
from collections.abc import Generator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distgpt.config import ModelConfig
from distgpt.model.generate import NUCLEUS_CANDIDATES, Sampling, draw, generate
from distgpt.model.gpt import GPT, KVCache

EOT = 3
VOCAB = 37
SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_multiple": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "tied": {"tied_head": True},
    "modern": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2},
    "documents": {"position": "rope", "document_mask": True, "n_kv_head": 1},
}


def make(variant: str = "learned", eot_id: int | None = EOT) -> GPT:
    """A model with large weights: with initial ones the logits of so small a network hardly depend on the tokens."""
    model = GPT(ModelConfig(**SHAPE, **VARIANTS[variant]), VOCAB, eot_id)
    model.init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(15)
    return model


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stream(
    model: GPT, prompt: Sequence[int], tokens: int, *, seed: int = 0, **options: Any
) -> Generator[tuple[int, int], None, None]:
    """Continue one prompt."""
    return generate(model, [prompt], max_tokens=tokens, sampling=Sampling(**options), generators=[seeded(seed)])


def ids(model: GPT, prompt: Sequence[int], tokens: int, *, seed: int = 0, **options: Any) -> list[int]:
    return [token for _, token in stream(model, prompt, tokens, seed=seed, **options)]


def greedy(model: GPT, prompt: Sequence[int], tokens: int) -> list[int]:
    return ids(model, prompt, tokens, temperature=0.0)


def together(
    model: GPT, prompts: Sequence[Sequence[int]], tokens: int, *, seeds: Sequence[int], **options: Any
) -> list[list[int]]:
    """Continue several prompts as one batch."""
    texts: list[list[int]] = [[] for _ in prompts]
    for row, token in generate(
        model, prompts, max_tokens=tokens, sampling=Sampling(**options), generators=[seeded(seed) for seed in seeds]
    ):
        texts[row].append(token)
    return texts


@torch.no_grad()
def greedy_recomputed(model: GPT, prompt: Sequence[int], tokens: int) -> list[int]:
    """Continue a prompt by the documented context rule, without a cache."""
    model.eval()
    size = model.config.block_size
    context, out = list(prompt)[-size:], []
    for _ in range(tokens):
        out.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        full = len(context) == size
        context = [*context, out[-1]]
        context = context[-(size // 2) :] if full else context
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", [[5], [1, 2, EOT, 4, 5, 6], list(range(25))])
def test_greedy_equals_recomputation_within_and_beyond_block_size(variant: str, prompt: list[int]) -> None:
    model = make(variant)
    expected = greedy_recomputed(model, prompt, 40)
    assert greedy(model, prompt, 40) == expected
    assert len(set(expected)) > 3


def test_the_seed_determines_the_tokens() -> None:
    model = make()
    runs = [ids(model, [1], 20, seed=seed) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_no_padding_id_is_drawn() -> None:
    model = make()
    with torch.no_grad():
        assert model.head.bias is not None
        model.head.bias[VOCAB:] = 1e4
    drawn = set(ids(model, [1], 400, temperature=5.0))
    assert max(drawn) < VOCAB
    assert len(drawn) > 20


def test_a_text_that_has_ended_gets_no_more_ids() -> None:
    """The others of its batch go on, and are not changed by it."""
    model, prompts = make(), [[1], [2, 5], [4]]
    texts: list[list[int]] = [[], [], []]
    for row, token in generate(
        model,
        prompts,
        max_tokens=30,
        sampling=Sampling(),
        generators=[seeded(seed) for seed in range(3)],
        ended=lambda row: len(texts[row]) == (7, 1, 99)[row],
    ):
        texts[row].append(token)
    assert [len(text) for text in texts] == [7, 1, 30]
    whole = [ids(model, prompt, 30, seed=seed) for seed, prompt in enumerate(prompts)]
    assert texts == [whole[0][:7], whole[1][:1], whole[2]]


BATCHES = {
    "one length": [[1, 2], [3, 4], [5, 6], [7, 8]],
    "several lengths": [[1], [2, 3, 4, 5, 6], [7, 8], []],
    "beyond block_size": [[1, EOT, 2], list(range(25)), list(range(16)), list(range(15))],
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.3}])
def test_a_text_of_a_batch_is_that_of_its_prompt_and_seed_alone(
    variant: str, prompts: list[list[int]], options: dict[str, Any]
) -> None:
    model, seeds = make(variant), [3, 1, 4, 1]
    alone = [ids(model, prompt, 24, seed=seed, **options) for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together(model, prompts, 24, seeds=seeds, **options) == alone


def test_a_cache_under_autocast_is_float32_on_a_cpu_and_gives_the_logits_of_one_forward() -> None:
    model, tokens_BT = make("modern").eval(), torch.arange(16).view(2, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        cache, expected = KVCache(model.config, capacity=8), model(tokens_BT)
        found = torch.cat([model(piece, cache=cache) for piece in torch.split(tokens_BT, [5, 1, 1, 1], dim=1)], dim=1)
        last = model(tokens_BT, last_only=True)
    assert cache.layers[0].k_BKSD.dtype == torch.float32
    assert cache.layers[0].k_BKSD.shape[2] == 8
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.equal(last, expected[:, -1:])


def test_each_step_of_a_batch_is_one_forward() -> None:
    model, shapes = make(), list[tuple[int, ...]]()
    model.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    together(model, [[1, 2], [3, 4], [5, 6, 7, 8]], 5, seeds=[0, 1, 2])
    assert shapes == [(3, 2), *[(3, 1)] * 4, (1, 1), (1, 1)]


@pytest.mark.parametrize(("eot_id", "start"), [(EOT, EOT), (None, 0)])
def test_an_empty_prompt_starts_from_end_of_text_or_0(eot_id: int | None, start: int) -> None:
    model = make(eot_id=eot_id)
    assert greedy(model, [], 10) == greedy(model, [start], 10)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_gradients_stay_enabled_for_the_caller(training: bool) -> None:
    model = make().train(training)
    tokens = stream(model, [1], 5)
    next(tokens)
    assert torch.is_grad_enabled()
    assert torch.backends.mkldnn.enabled
    assert not model.training
    tokens.close()
    assert model.training is training
    ids(model, [1], 5)
    assert model.training is training


def test_dropout_is_off() -> None:
    model = GPT(ModelConfig(**SHAPE, dropout=0.5), VOCAB).train()
    model.init_weights(0)
    assert greedy(model, [1], 30) == greedy(model, [1], 30)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_a_value_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be"):
        Sampling(**wrong)


def test_arguments_out_of_range_are_refused_at_the_call() -> None:
    with pytest.raises(ValueError, match="max_tokens is -1"):
        stream(make(), [1], -1)
    with pytest.raises(ValueError, match="2 prompts and 1 generators"):
        generate(make(), [[1], [2]], max_tokens=1, sampling=Sampling(), generators=[seeded()])


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_a_prompt_outside_the_vocabulary_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"id {wrong}, outside the vocabulary of {VOCAB}"):
        stream(make(), [1, wrong], 1)


def test_max_tokens_0_draws_nothing() -> None:
    assert ids(make(), [1], 0) == []


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def shares(logits_V: Tensor, seen: Sequence[int] = (), *, draws: int = 4000, **options: Any) -> Tensor:
    """Return the share of each id in draws with evenly spaced numbers: its probability, to 1 / draws for each id."""
    uniform = ((torch.arange(draws) + 0.5) / draws).tolist()
    seen_BV = torch.zeros(draws, len(logits_V), dtype=torch.bool)
    seen_BV[:, list(seen)] = True
    drawn = draw(logits_V.expand(draws, -1), uniform, Sampling(**options), seen_BV)
    return drawn.bincount(minlength=len(logits_V)) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 0.5}, [p * p / 0.285 for p in (0.05, 0.4, 0.1, 0.3, 0.15)]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 50}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"min_p": 0.3}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        ({"min_p": 0.5, "temperature": 0.5}, [0, 16 / 25, 0, 9 / 25, 0]),
        ({"min_p": 0.5, "top_p": 0.9}, [0, 4 / 7, 0, 3 / 7, 0]),
    ],
)
def test_draw_follows_the_truncated_distribution(options: dict[str, Any], expected: list[float]) -> None:
    drawn = shares(PROBABILITIES.log(), **options)
    assert drawn.tolist() == pytest.approx(expected, abs=1e-3)
    assert ((drawn > 0) == (torch.tensor(expected) > 0)).all()


def test_ids_as_likely_as_the_last_one_kept_are_kept() -> None:
    """So the order in which a device sorts equal logits, which bfloat16 has many of, does not count."""
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0])
    expected = logits.exp() * (logits > 0) / logits[1:].exp().sum()
    for options in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}):
        assert shares(logits, **options).tolist() == pytest.approx(expected.tolist(), abs=1e-3)


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = torch.tensor([2.0, 2.0, -1.0, -1.0])
    expected = torch.tensor([2.0, 2.0 / 1.5, -1.0 * 1.5, -1.0]).softmax(0)
    assert shares(logits, seen=[1, 2], repetition_penalty=1.5).tolist() == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_the_strongest_penalties_leave_finite_probabilities(penalty: float) -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, -1.0])
    expected = [0, 1, 0, 0] if penalty < 1 else [0.5, 0.5, 0, 0]  # those that are equal after the penalty
    assert shares(logits, seen=[0, 1, 2, 3], repetition_penalty=penalty).tolist() == expected


def test_a_large_repetition_penalty_repeats_no_id_of_prompt_and_text() -> None:
    model = make()
    prompt = list(range(20))  # longer than block_size: what the model no longer sees counts too
    plain, penalized = greedy(model, prompt, 15), ids(model, prompt, 15, temperature=0.0, repetition_penalty=1e9)
    assert len(set(prompt + plain)) < 35
    assert len(set(prompt + penalized)) == 35


@pytest.mark.parametrize("spread", [0.01, 3.0])  # the nucleus is larger than the part that is looked at first, or not
def test_a_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort(spread: float) -> None:
    logits_BV = torch.randn(2, 4 * NUCLEUS_CANDIDATES, generator=seeded()) * spread
    for p_V in logits_BV.softmax(dim=1):
        largest = p_V.sort(descending=True).values
        size = int((largest.cumsum(0) < 0.7).sum()) + 1
        assert (size > NUCLEUS_CANDIDATES) == (spread < 1)
        drawn = shares(p_V.log(), draws=1000, top_p=0.7)
        assert set(drawn.nonzero().flatten().tolist()) <= set(p_V.topk(size).indices.tolist())
        assert drawn[p_V.argmax()] == pytest.approx(float(largest[0] / largest[:size].sum()), abs=1e-3)


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_model_generates_the_same_tokens_and_can_train_afterwards() -> None:
    whole, sharded = make("modern"), make("modern")
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    prompts = [[1, 2], [3]]
    expected = together(whole, prompts, 25, seeds=[0, 1], top_p=0.9)
    assert together(sharded, prompts, 25, seeds=[0, 1], top_p=0.9) == expected
    tokens = torch.arange(16).view(2, 8)
    sharded(tokens, tokens).mean().backward()
    assert all(p.grad is not None for p in sharded.parameters())
