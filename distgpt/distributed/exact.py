"""Sums that are the same to the bit in whatever order, on however many ranks, they are taken.

Adding floating-point numbers rounds, so the result depends on the order. Integers do not: each number is rounded once
to a multiple of a fixed unit, and the multiples are added as 64-bit integers (pre-rounded or fixed-point summation;
for the alternatives see Demmel & Nguyen 2013, "Fast Reproducible Floating-Point Summation").

Gradients have the unit 2^-44, about 6e-14: a millionth of AdamW's eps, so what the rounding takes away never shows in
an update. They are added up to 2^18. A sum of squares or losses has a finer unit, 2^-56, in two integers. Whatever is
larger than that, infinite or NaN cannot be added; the caller has to ask fits() and must not use such a sum.
"""

import torch
from torch import Tensor

GRADIENT_UNITS = 2.0**44  # in one
MAX_GRADIENT = 2.0**18  # so a sum stays below 2^62 units
COARSE_UNITS, FINE_UNITS = 2.0**16, 2.0**56  # in one
MAX_SUMMAND = 2.0**36  # float64 splits it into both units without a rest


def to_units(gradient: Tensor) -> Tensor:
    """Round float32 numbers of up to MAX_GRADIENT to integer multiples of the unit of gradients, int64."""
    return (gradient * GRADIENT_UNITS).round_().to(torch.int64)


def from_units(units: Tensor) -> Tensor:
    """Invert to_units, rounding to float32 once."""
    return units.to(torch.float32).mul_(1 / GRADIENT_UNITS)


def largest(values: Tensor) -> Tensor:
    """Return the largest absolute value, a scalar; NaN if a value is NaN."""
    return torch.linalg.vector_norm(values, float("inf")) if values.numel() else values.new_zeros(())


def fits(value: Tensor, limit: float) -> Tensor:
    """Tell whether a number is at most `limit`; NaN is not."""
    return value <= limit


def split_sum(values: Tensor) -> Tensor:
    """Return the sum of float64 numbers of up to MAX_SUMMAND as two integers, (2,) int64, to be added to others."""
    coarse = (values * COARSE_UNITS).round()
    fine = ((values - coarse / COARSE_UNITS) * FINE_UNITS).round()
    return torch.stack([part.to(torch.int64).sum() for part in (coarse, fine)])


def joined(sums: Tensor) -> Tensor:
    """Return the float64 number that two integers of split_sum, or a sum of such pairs, stand for."""
    coarse, fine = sums.double().unbind()
    total: Tensor = coarse / COARSE_UNITS + fine / FINE_UNITS
    return total


def digest(units: Tensor) -> Tensor:
    """Return a hash of integers, a scalar int64: their sum, weighted by odd numbers, modulo 2^64."""
    weights = torch.arange(1, 2 * units.numel(), 2, device=units.device)
    return weights.mul_(units.flatten()).sum()


def row_sums(values_RC: Tensor) -> Tensor:
    """Return the sum of each row, (R,), changing `values_RC`. Adds halves of rows, so the number of rows is no matter.

    A kernel that reduces may choose another order for another number of rows.
    """
    while (columns := values_RC.shape[1]) > 1:
        half = (columns + 1) // 2
        values_RC[:, : columns - half] += values_RC[:, half:]
        values_RC = values_RC[:, :half]
    return values_RC[:, 0]
