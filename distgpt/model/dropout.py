"""Dropout with masks that are cheap to draw on a CPU.

F.dropout draws Bernoulli numbers there one by one, which takes a quarter of a training step in bfloat16. Here a random
64-bit word gives four 16-bit numbers, and an element is dropped if its number is below a threshold: the same
distribution, with a probability exact to 2^-16.

Given a seed for each sequence, each has a generator of its own in each layer. So its masks are a function of its seed
and the layer, in whatever batch it is, and activation checkpointing draws the same ones again. Without seeds, masks
come from torch's default generator, as those of F.dropout do.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16  # values of a 16-bit number
NUMBERS_PER_WORD = 4

# One for each sequence of a batch, or one for all; None: torch's default generator.
Generators = Sequence[torch.Generator | None]
DEFAULT_GENERATOR: Generators = (None,)


class Dropout(nn.Dropout):
    """nn.Dropout, with cheap masks on a CPU."""

    def forward(self, x: Tensor, generators: Generators = DEFAULT_GENERATOR) -> Tensor:
        """Apply dropout to x, of any shape, in training mode."""
        return dropout(x, self.p, generators) if self.training else x


def derived_seed(*numbers: int) -> int:
    """Return a seed that is a hash of these numbers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seeded_generators(seeds: Sequence[int] | None) -> Generators:
    """Return a new generator for each seed; without seeds, the default one."""
    return DEFAULT_GENERATOR if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]


def dropout(x: Tensor, p: float, generators: Generators = DEFAULT_GENERATOR) -> Tensor:
    """Zero each element with probability p, and divide the others by 1 - p.

    Several generators draw the masks of the sequences of x, its first dimension. Compiled code and other devices than
    CPUs draw all from their default generator.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # a compiled draw is fused with its neighbors
        return F.dropout(x, p)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    return x * random_mask(x.shape, dropped, x.dtype, generators)


def random_mask(
    shape: torch.Size, dropped: int, dtype: torch.dtype, generators: Generators = DEFAULT_GENERATOR
) -> Tensor:
    """Return a tensor whose elements are 0 with probability p = `dropped` / LEVELS, otherwise 1 / (1 - p).

    In bfloat16 that scale is rounded by up to 0.4%, as that of F.dropout is.
    """
    count = math.prod(shape) // len(generators)
    words = torch.empty(len(generators), math.ceil(count / NUMBERS_PER_WORD), dtype=torch.int64)
    for row, generator in zip(words, generators, strict=True):
        row.random_(-(2**63), None, generator=generator)
    numbers = words.view(torch.int16)[:, :count]
    # In place the comparison gives int16 ones and zeros, seventeen times as fast as it gives booleans.
    kept = numbers.ge_(dropped - LEVELS // 2)
    scale = torch.tensor(LEVELS / (LEVELS - dropped), dtype=dtype)
    if dtype.itemsize == kept.itemsize:  # multiply the scale's bits by 0 or 1: no conversion
        return kept.mul_(scale.view(torch.int16)).view(dtype).reshape(shape)
    return kept.to(dtype).mul_(scale).reshape(shape)
