"""Attention in blocks of queries against F.scaled_dot_product_attention, and with dropout against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distgpt.model import cpu_attention
from distgpt.model.cpu_attention import attention_in_blocks
from distgpt.model.dropout import dropout


def queries_keys_values(T: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(2, 3, T, 4) each, laid out as slices of one projection."""
    qkv = torch.randn(2, T, 9, 4, dtype=dtype, generator=torch.Generator().manual_seed(T)).transpose(1, 2)
    q, k, v = (qkv[:, part].detach().requires_grad_() for part in (slice(0, 3), slice(3, 6), slice(6, 9)))
    return q, k, v


def document_mask(T: int) -> Tensor:
    """A document ends at a third of the first sequence, another at half of the second."""
    document = torch.stack([torch.arange(T) >= T // 3, torch.arange(T) >= T // 2])
    return (document[:, :, None] == document[:, None, :]).tril().unsqueeze(1)


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected)
    weight = torch.randn(actual.shape, dtype=actual.dtype, generator=torch.Generator().manual_seed(0))
    for a, b in zip(*(torch.autograd.grad(y, inputs, weight) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("T", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("documents", [False, True])
def test_it_equals_sdpa_without_dropout(T: int, documents: bool) -> None:
    q, k, v = queries_keys_values(T)
    mask = document_mask(T) if documents else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    assert_equal_with_gradients(attention_in_blocks(q, k, v, mask=mask, dropout_p=0.0), expected, (q, k, v))


@pytest.mark.parametrize("queries", [128, 4])
def test_dropped_weights_give_the_gradients_of_autograd(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    """The reference keeps the weights of all keys, and draws the masks of a block for those that the block has."""
    T, p = 13, 0.3
    monkeypatch.setattr(cpu_attention, "MIN_QUERIES", queries)
    q, k, v = queries_keys_values(T)
    torch.manual_seed(5)
    scores = (q @ k.mT / math.sqrt(4)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    rows = []
    for start in range(0, T, queries):
        end = min(start + queries, T)
        weights = scores.softmax(dim=-1)[:, :, start:end]
        rows.append(F.pad(dropout(weights[..., :end], p), (0, T - end)) @ v)
    torch.manual_seed(5)
    actual = attention_in_blocks(q, k, v, mask=None, dropout_p=p)
    assert_equal_with_gradients(actual, torch.cat(rows, dim=2), (q, k, v))


def test_the_gradient_is_that_of_finite_differences() -> None:
    def seeded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return attention_in_blocks(q, k, v, mask=None, dropout_p=0.4)

    assert torch.autograd.gradcheck(seeded, queries_keys_values(5))


def test_a_query_does_not_see_its_future() -> None:
    q, k, v = queries_keys_values(300)
    before = attention_in_blocks(q, k, v, mask=None, dropout_p=0.0)
    with torch.no_grad():
        k[:, :, 200:], v[:, :, 200:] = 7.0, 7.0
    after = attention_in_blocks(q, k, v, mask=None, dropout_p=0.0)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


def test_bfloat16_is_close_to_sdpa() -> None:
    q, k, v = queries_keys_values(300, torch.bfloat16)
    actual = attention_in_blocks(q, k, v, mask=None, dropout_p=0.0)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(actual.double(), expected, atol=0.02, rtol=0.02)
