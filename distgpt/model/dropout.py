"""Dropout with masks that are cheap to draw on a CPU.

F.dropout draws Bernoulli numbers there one by one, which takes a quarter of a training step in bfloat16. Here a random
64-bit word gives four 16-bit numbers, and an element is dropped if its number is below a threshold: the same
distribution, with a probability exact to 2^-16. Masks come from torch's default generator, as those of F.dropout do, so
its seed decides all of them, and activation checkpointing draws the same ones again.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16  # values of a 16-bit number
NUMBERS_PER_WORD = 4


class Dropout(nn.Dropout):
    """nn.Dropout, with cheap masks on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to x, of any shape, in training mode."""
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p, and divide the others by 1 - p."""
    if p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():  # a compiled draw is fused with its neighbors
        return F.dropout(x, p)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    return x * random_mask(x.shape, dropped, x.dtype) * (LEVELS / (LEVELS - dropped))


def random_mask(shape: torch.Size, dropped: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor whose elements are 0 with probability `dropped` / LEVELS, otherwise 1."""
    count = math.prod(shape)
    words = torch.empty(math.ceil(count / NUMBERS_PER_WORD), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[:count]
    # In place the comparison gives int16 ones and zeros, seventeen times as fast as it gives booleans.
    return numbers.ge_(dropped - LEVELS // 2).to(dtype).view(shape)
