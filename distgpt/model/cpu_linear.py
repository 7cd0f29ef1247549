"""Linear layers for AMD's CPUs with AVX-512, by oneDNN: a 1 x 1 convolution computes the same products.

In float32 F.linear calls MKL, which reaches half of oneDNN's speed on these CPUs. In bfloat16 it calls oneDNN, but
first copies the bias into each row of the result, which a convolution need not.
"""

import functools
import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from distgpt.machine import cpu_has_one_of

# On one thread torch calls oneDNN only for 16 images or more. So the tokens become 16 images, one pixel wide.
IMAGES = 16
# Smaller products are not faster as convolutions.
MIN_TOKENS = {torch.float32: 1024, torch.bfloat16: 4096}
MIN_WEIGHTS = 2**16


class Linear(nn.Linear):
    """nn.Linear, as a convolution where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., outputs), for x (..., inputs)."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        tokens = x.numel() // self.in_features
        large = tokens >= MIN_TOKENS.get(dtype, math.inf) and self.weight.numel() >= MIN_WEIGHTS
        eager_on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if large and tokens % IMAGES == 0 and eager_on_cpu and convolution_is_faster():
            if dtype == torch.float32:
                return _convolve(x, self.weight, self.bias)
            if self.bias is not None:
                arguments = (x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
                y: Tensor = _BiasedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
                return y
        return F.linear(x, self.weight, self.bias)


class _BiasedLinear(torch.autograd.Function):
    """The forward pass is a convolution. The backward pass is that of F.linear, which is faster in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        return gradient @ weight, rows.mT @ x.flatten(0, -2), rows.sum(dim=0)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    images = x.reshape(IMAGES, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (IMAGES, inputs, tokens / IMAGES, 1)
    y = F.conv2d(images, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


@functools.cache
def convolution_is_faster() -> bool:
    """Tell whether this is a CPU of AMD with AVX-512. Not measured, so that the same computer always rounds alike."""
    is_amd = cpu_has_one_of({"AuthenticAMD"}) and cpu_has_one_of({"avx512f"})
    return is_amd and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
