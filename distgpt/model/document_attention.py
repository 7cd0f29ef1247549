"""Attention within documents on GPUs: FlexAttention skips the blocks of other documents and of the future.

It has kernels in compiled code alone. FlexAttention: Dong et al. 2024, arXiv:2412.05496.

Shape suffixes as in gpt.py.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

# The queries, and the keys, of a block that is skipped or not.
BLOCK = 128
# Products in Triton need 16 columns. The kernels for heads above 128 exceed the shared memory of some GPUs.
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 128


def flex_is_best(device: torch.device, *, tokens: int, head_size: int) -> bool:
    """Tell whether compiled code should take FlexAttention for sequences of `tokens`, under the current autocast.

    Its float32 kernels are slow, and a sequence within one block has nothing to skip.
    """
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return False
    is_bfloat16 = torch.get_autocast_dtype("cuda") == torch.bfloat16
    return is_bfloat16 and tokens > BLOCK and MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE


def document_blocks(document_BT: Tensor) -> BlockMask:
    """Return the mask of all layers. `document_BT`: the document of each token, counted within its sequence."""

    def allowed(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[b, query] == document_BT[b, key])

    B, T = document_BT.shape
    return create_block_mask(allowed, B, None, T, T, device=document_BT.device, BLOCK_SIZE=BLOCK)


def dense_mask(blocks: BlockMask) -> Tensor:
    """Return True where a query may attend to a key, (B, 1, T, T)."""
    B, _, T, S = blocks.shape
    return create_mask(blocks.mask_mod, B, None, T, S, device=blocks.kv_indices.device)
