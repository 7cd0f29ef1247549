"""Sampling: the context rule, truncation, seeds, and sharded models."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distgpt.config import ModelConfig
from distgpt.model.generate import draw, generate
from distgpt.model.gpt import GPT

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


def greedy(model: GPT, prompt: Sequence[int], tokens: int) -> list[int]:
    return list(generate(model, prompt, max_tokens=tokens, temperature=0.0, generator=seeded()))


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
    runs = [list(generate(model, [1], max_tokens=20, generator=seeded(s))) for s in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_no_padding_id_is_drawn() -> None:
    model = make()
    with torch.no_grad():
        assert model.head.bias is not None
        model.head.bias[VOCAB:] = 1e4
    ids = set(generate(model, [1], max_tokens=400, temperature=5.0, generator=seeded()))
    assert max(ids) < VOCAB
    assert len(ids) > 20


def test_generation_stops_at_end_of_text() -> None:
    model = make()
    plain = list(generate(model, [1], max_tokens=400, generator=seeded()))
    stopped = list(generate(model, [1], max_tokens=400, generator=seeded(), stop_at_eot=True))
    assert len(stopped) > 1
    assert stopped == plain[: plain.index(EOT) + 1]


def test_generation_does_not_stop_without_an_end_of_text_id() -> None:
    assert len(list(generate(make(eot_id=None), [1], max_tokens=50, generator=seeded(), stop_at_eot=True))) == 50


@pytest.mark.parametrize(("eot_id", "start"), [(EOT, EOT), (None, 0)])
def test_an_empty_prompt_starts_from_end_of_text_or_0(eot_id: int | None, start: int) -> None:
    model = make(eot_id=eot_id)
    assert greedy(model, [], 10) == greedy(model, [start], 10)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_gradients_stay_enabled_for_the_caller(training: bool) -> None:
    model = make().train(training)
    stream = generate(model, [1], max_tokens=5, generator=seeded())
    next(stream)
    assert torch.is_grad_enabled()
    assert not model.training
    stream.close()
    assert model.training is training
    list(generate(model, [1], max_tokens=5, generator=seeded()))
    assert model.training is training


def test_dropout_is_off() -> None:
    model = GPT(ModelConfig(**SHAPE, dropout=0.5), VOCAB).train()
    model.init_weights(0)
    assert greedy(model, [1], 30) == greedy(model, [1], 30)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_arguments_out_of_range_are_refused_at_the_call(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(make(), [1], **{"max_tokens": 1, "generator": seeded(), **wrong})


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_a_prompt_outside_the_vocabulary_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"id {wrong}, outside the vocabulary of {VOCAB}"):
        generate(make(), [1, wrong], max_tokens=1, generator=seeded())


def test_max_tokens_0_draws_nothing() -> None:
    assert list(generate(make(), [1], max_tokens=0, generator=seeded())) == []


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


def frequencies(*, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, draws: int = 20_000) -> Tensor:
    logits = PROBABILITIES.log().expand(draws, -1)
    return draw(logits, temperature, top_k, top_p, seeded()).bincount(minlength=5) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"temperature": 0.5}, [p * p / 0.285 for p in (0.05, 0.4, 0.1, 0.3, 0.15)]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 50}, [0.05, 0.4, 0.1, 0.3, 0.15]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
        ({"top_k": 3, "top_p": 0.8}, [0, 4 / 7, 0, 3 / 7, 0]),
    ],
)
def test_draw_follows_the_truncated_distribution(options: dict[str, Any], expected: list[float]) -> None:
    drawn = frequencies(**options)
    assert drawn.tolist() == pytest.approx(expected, abs=0.015)
    assert ((drawn > 0) == (torch.tensor(expected) > 0)).all()


def test_greedy_uses_no_random_numbers() -> None:
    generator = seeded()
    before = generator.get_state()
    list(generate(make(), [1], max_tokens=3, temperature=0.0, generator=generator))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.usefixtures("one_process_group")
def test_a_sharded_model_generates_the_same_tokens_and_can_train_afterwards() -> None:
    whole, sharded = make("modern"), make("modern")
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    arguments: dict[str, Any] = {"max_tokens": 25, "top_p": 0.9}
    expected = list(generate(whole, [1, 2], **arguments, generator=seeded()))
    assert list(generate(sharded, [1, 2], **arguments, generator=seeded())) == expected
    tokens = torch.arange(16).view(2, 8)
    sharded(tokens, tokens).mean().backward()
    assert all(p.grad is not None for p in sharded.parameters())
