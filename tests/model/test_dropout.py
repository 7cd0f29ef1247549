"""Dropout: the distribution of its cheap masks, what they depend on, and its gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distgpt.model.dropout import LEVELS, Dropout, derived_seed, dropout, random_mask, seeded_generators

MANY = torch.Size((1000, 1000))


def seeded_mask(seed: int, shape: torch.Size = MANY, p: float = 0.2) -> Tensor:
    torch.manual_seed(seed)
    return random_mask(shape, round(p * LEVELS), torch.float32)


@pytest.mark.parametrize(("p", "dropped"), [(0.0, 0), (0.2, 13107), (0.5, 32768), (0.9999999, 65535)])
def test_the_probability_is_exact_to_a_65536th(monkeypatch: pytest.MonkeyPatch, p: float, dropped: int) -> None:
    """Of all 16-bit numbers, each once, as many as the probability says drop an element."""

    def count_up(words: Tensor, *_: object, generator: None) -> Tensor:
        words.view(torch.int16).copy_(torch.arange(-(2**15), 2**15))
        return words

    monkeypatch.setattr(Tensor, "random_", count_up)
    y = dropout(torch.ones(LEVELS, dtype=torch.float64), p)
    assert (y == 0).sum() == dropped
    assert y.max() == LEVELS / (LEVELS - dropped)
    assert y.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("place", range(4))
def test_each_quarter_of_a_random_word_drops_its_share(place: int) -> None:
    """The share of 250,000 draws deviates by more than 5 of its standard deviations once in a million seeds."""
    assert (seeded_mask(0).flatten()[place::4] == 0).float().mean().item() == pytest.approx(0.2, abs=0.004)


def test_elements_are_dropped_independently() -> None:
    mask = seeded_mask(0).flatten()
    for distance in (1, 2, 3, 4, 1000):
        both = (mask[:-distance] + mask[distance:] == 0).float().mean().item()
        assert both == pytest.approx(0.04, abs=0.001)


def test_a_mask_depends_on_the_seed_alone() -> None:
    assert torch.equal(seeded_mask(1), seeded_mask(1))
    assert not torch.equal(seeded_mask(1), seeded_mask(2))
    torch.manual_seed(1)
    assert not torch.equal(random_mask(MANY, 9, torch.float32), random_mask(MANY, 9, torch.float32))


@pytest.mark.parametrize("sequence", [(7,), (3, 5)])
def test_the_mask_of_a_sequence_depends_on_its_seed_alone(sequence: tuple[int, ...]) -> None:
    def masks(*seeds: int) -> Tensor:
        return random_mask(torch.Size((len(seeds), *sequence)), LEVELS // 2, torch.float32, seeded_generators(seeds))

    default = torch.get_rng_state()
    assert torch.equal(masks(1, 2, 3), torch.cat([masks(1), masks(2, 3)]))
    assert not torch.equal(masks(1), masks(2))
    assert torch.equal(torch.get_rng_state(), default)


def test_derived_seeds_are_the_same_in_each_process_and_differ_in_each_number() -> None:
    assert derived_seed(1337, 2, 3) == 2644143879359654046
    assert len({derived_seed(*numbers) for numbers in ((1, 2), (2, 1), (12,), (1, 2, 0), (1, 3))}) == 5


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2), (0, 4)])
def test_a_mask_has_any_shape(shape: tuple[int, ...]) -> None:
    assert seeded_mask(0, torch.Size(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_dropped_and_scaled_as_the_value_is(dtype: torch.dtype) -> None:
    x = torch.randn(64, 33, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.25)
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, torch.where(kept, torch.full_like(x, 1 / 0.75), 0.0))


def test_the_module_drops_in_training_alone() -> None:
    x, module = torch.ones(100), Dropout(0.5)
    assert set(module(x).tolist()) == {0.0, 2.0}
    assert module.eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_other_devices_and_compiled_code_draw_their_own_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def own(x: Tensor, p: float) -> Tensor:
        asked.append((x.device.type, p))
        return x

    monkeypatch.setattr(F, "dropout", own)
    dropout(torch.ones(4, device="meta"), 0.3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    dropout(torch.ones(4), 0.4)
    assert asked == [("meta", 0.3), ("cpu", 0.4)]
