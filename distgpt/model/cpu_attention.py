"""Causal attention for CPUs, in blocks of queries that leave out the keys in their future.

On a CPU F.scaled_dot_product_attention has no fast kernel with dropout, and its kernel for bfloat16 takes two to four
times as long as these products do. Those kernels need less memory, however: here the attention weights are kept for the
backward pass, about T^2 / 2 of them for each head and layer.

Shape suffixes as in gpt.py. Q: queries of a block. P: keys up to the last query of the block.
"""

import math

import torch
from torch import Tensor

from distgpt.model.dropout import DEFAULT_GENERATOR, Generators, dropout

# The number of queries in a block, and of blocks in a long sequence. Smaller products are slower.
MIN_QUERIES, MAX_BLOCKS = 128, 4


def attention_in_blocks(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    *,
    mask: Tensor | None,
    dropout_p: float,
    generators: Generators = DEFAULT_GENERATOR,
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, with dropout of the weights, (B, H, T, D).

    `mask`: True where a query may attend to a key, but never for a key in its future; broadcast to (B, H, T, T). None:
    causal. `generators`: as of dropout().
    """
    T, D = q_BHTD.shape[-2:]
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q_BHTD.device).tril()
    bias = torch.zeros_like(mask, dtype=q_BHTD.dtype).masked_fill_(~mask, -math.inf)
    q_BHTD, k_BHTD, v_BHTD = (q_BHTD * D**-0.5).contiguous(), k_BHTD.contiguous(), v_BHTD.contiguous()
    size = max(MIN_QUERIES, math.ceil(T / MAX_BLOCKS))
    y_BQHD = []
    for start in range(0, T, size):
        end = min(start + size, T)
        scores_BHQP = q_BHTD[:, :, start:end] @ k_BHTD[:, :, :end].mT + bias[..., start:end, :end]
        weights_BHQP = dropout(scores_BHQP.softmax(dim=-1), dropout_p, generators)
        y_BQHD.append((weights_BHQP @ v_BHTD[:, :, :end]).transpose(1, 2))
    return torch.cat(y_BQHD, dim=1).transpose(1, 2)
