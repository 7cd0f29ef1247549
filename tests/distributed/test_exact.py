"""Exact sums: in any order, in any parts, the same bits."""

import math
from fractions import Fraction
from functools import reduce

import pytest
import torch
from torch import Tensor

from distgpt.distributed.exact import (
    GRADIENT_UNITS,
    MAX_GRADIENT,
    MAX_SUMMAND,
    fits,
    from_units,
    joined,
    largest,
    row_sums,
    split_sum,
    to_units,
)


def numbers(count: int, *, spread: float) -> Tensor:
    """Return numbers of either sign whose magnitudes spread over so many powers of ten."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(count, generator=generator, dtype=torch.float64) * spread - spread / 2
    return (torch.randn(count, generator=generator, dtype=torch.float64) * 10**exponents).float()


def test_gradients_are_added_in_any_order_and_rounded_to_float32_once() -> None:
    gradients = numbers(24 * 50, spread=2.0).view(24, 50)
    added = torch.stack([to_units(gradient) for gradient in gradients])
    total = from_units(added.sum(dim=0))
    for order in (torch.arange(23, -1, -1), torch.randperm(24, generator=torch.Generator().manual_seed(1))):
        halves = [added[part].sum(dim=0) for part in torch.split(order, [7, 17])]
        assert torch.equal(from_units(halves[0] + halves[1]), total)
    units = [[round(Fraction(value) * int(GRADIENT_UNITS)) for value in row] for row in gradients.tolist()]
    expected = [Fraction(sum(column), int(GRADIENT_UNITS)) for column in zip(*units, strict=True)]
    assert total.tolist() == torch.tensor([float(value) for value in expected]).tolist()
    in_order = reduce(torch.add, gradients.flip(0))
    assert not torch.equal(in_order, total)  # float32 does depend on it
    torch.testing.assert_close(in_order, total, rtol=1e-4, atol=1e-9)


def test_the_largest_gradients_fit_and_others_are_found() -> None:
    limit = torch.tensor([MAX_GRADIENT, -MAX_GRADIENT, 1 / GRADIENT_UNITS, -1 / GRADIENT_UNITS, 0.0])
    assert torch.equal(from_units(to_units(limit)), limit)
    assert fits(largest(limit), MAX_GRADIENT)
    assert fits(largest(torch.empty(0)), 0.0)
    for bad in (math.nan, math.inf, -math.inf, 2 * MAX_GRADIENT):
        values = torch.zeros(100)
        values[37] = bad
        assert not fits(largest(values), MAX_GRADIENT)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e8])
def test_a_split_sum_has_the_precision_of_float64_in_any_parts(scale: float) -> None:
    values = numbers(1000, spread=4.0).double().abs() * scale
    whole = split_sum(values)
    parts = [split_sum(part) for part in torch.split(values.flip(0), [1, 0, 333, 666])]
    assert torch.equal(torch.stack(parts).sum(dim=0), whole)
    assert joined(whole).item() == pytest.approx(math.fsum(values.tolist()), rel=1e-13, abs=1e-13)
    assert joined(split_sum(torch.tensor([MAX_SUMMAND, 2.0**-56], dtype=torch.float64))).item() == MAX_SUMMAND
    assert joined(split_sum(torch.tensor([3.0, 2.0**-40], dtype=torch.float64))).item() == 3 + 2.0**-40


@pytest.mark.parametrize("columns", [1, 2, 3, 34, 257])
def test_the_sum_of_a_row_does_not_depend_on_the_other_rows(columns: int) -> None:
    values_RC = numbers(13 * columns, spread=6.0).double().view(13, columns)
    sums = row_sums(values_RC.clone())
    assert sums.tolist() == pytest.approx([math.fsum(row) for row in values_RC.tolist()], rel=1e-9)
    for rows in ([13], [1] * 13, [4, 4, 4, 1]):
        assert torch.equal(torch.cat([row_sums(part.clone()) for part in torch.split(values_RC, rows)]), sums)
