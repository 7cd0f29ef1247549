"""Attention within documents on GPUs: FlexAttention skips the blocks of other documents and of the future.

It has fast kernels only in compiled code. FlexAttention: Dong et al. 2024, arXiv:2412.05496.

Shape suffixes as in gpt.py.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

# Queries, and keys, in a block. A block is skipped as a whole.
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
    """Return the mask of all layers. `document_BT`: the document of each token, counted within its sequence.

    The documents at the ends of blocks tell which blocks to skip. create_block_mask would compute a whole mask.
    """

    def allowed(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[b, query] == document_BT[b, key])

    T = document_BT.shape[1]
    starts_N = torch.arange(0, T, BLOCK, device=document_BT.device)
    first_BN, last_BN = document_BT[:, starts_N], document_BT[:, (starts_N + BLOCK - 1).clamp(max=T - 1)]
    past_NN = starts_N[:, None] > starts_N
    # Rows: blocks of queries. Columns: blocks of keys. In a full block every query may attend to every key.
    some_BNN = (last_BN[:, None, :] >= first_BN[:, :, None]) & (past_NN | (starts_N[:, None] == starts_N))
    full_BNN = (first_BN[:, None, :] == last_BN[:, :, None]) & past_NN & (starts_N[:, None] + BLOCK <= T)
    partial, full = _numbers_and_places(some_BNN & ~full_BNN), _numbers_and_places(full_BNN)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(T, T))


def _numbers_and_places(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row has, (B, 1, N), and their columns, before the others, (B, 1, N, N)."""
    columns = blocks_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BNN.sum(dim=-1, dtype=torch.int32)[:, None], columns.int()[:, None]


def dense_mask(blocks: BlockMask) -> Tensor:
    """Return True where a query may attend to a key, (B, 1, T, T)."""
    B, _, T, S = blocks.shape
    return create_mask(blocks.mask_mod, B, None, T, S, device=blocks.kv_indices.device)
