"""Linear layers in float32 for AMD's CPUs with AVX-512.

MKL, which F.linear calls, reaches half of the speed of oneDNN on these CPUs. torch calls oneDNN for a convolution, and
one whose kernel is a single point computes the same products.
"""

import functools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from distgpt.machine import cpu_has_one_of

# torch calls oneDNN for batches of at least so many images. The tokens are laid out as so many images of one column.
IMAGES = 16
# Smaller products are faster in MKL.
MIN_TOKENS, MIN_WEIGHTS = 1024, 2**14


class Linear(nn.Linear):
    """nn.Linear, as a convolution where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, (..., outputs), for x (..., inputs)."""
        tokens = x.numel() // self.in_features
        large = tokens >= MIN_TOKENS and self.weight.numel() >= MIN_WEIGHTS
        if not (large and tokens % IMAGES == 0 and _is_float32_on_cpu(x) and convolution_is_faster()):
            return F.linear(x, self.weight, self.bias)
        images = x.reshape(IMAGES, -1, 1, self.in_features).permute(0, 3, 1, 2)  # (IMAGES, inputs, tokens / IMAGES, 1)
        y = F.conv2d(images, self.weight[:, :, None, None], self.bias)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def _is_float32_on_cpu(x: Tensor) -> bool:
    is_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return is_float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def convolution_is_faster() -> bool:
    """Tell whether this is a CPU of AMD with AVX-512. Not measured, so that the same computer always rounds alike."""
    is_amd = cpu_has_one_of({"AuthenticAMD"}) and cpu_has_one_of({"avx512f"})
    return is_amd and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
