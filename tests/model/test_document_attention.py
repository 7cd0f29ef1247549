"""Document masks by blocks for FlexAttention, against F.scaled_dot_product_attention with the whole mask.

FlexAttention refuses gradients on CPUs, though its compiled code has them there. The tests lift that check.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from distgpt.config import ModelConfig
from distgpt.model import gpt
from distgpt.model.document_attention import dense_mask, document_blocks, flex_is_best
from distgpt.model.gpt import GPT, KVCache

EOT = 3
GPU = torch.device("cuda")
LENGTHS = [1, 128, 129, 300]
SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 300, "document_mask": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"mlp": "gelu", "qkv_bias": True, "tied_head": True},
    "modern": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2},
    "three to one, wide": {"n_head": 3, "n_kv_head": 1, "head_size": 24, "position": "rope"},
}


def documents(T: int) -> Tensor:
    """(3, T): several documents, many of one token, and a single one."""
    ends = torch.zeros(3, T, dtype=torch.int64)
    ends[0, [T // 7, T // 2, T // 2 + T // 8]] = 1
    ends[1, : T // 3] = 1
    return ends.cumsum(dim=1) - ends


def expected_mask(document_BT: Tensor) -> Tensor:
    return (document_BT[:, :, None] == document_BT[:, None, :]).tril().unsqueeze(1)


def some_tokens(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


def make(**options: Any) -> GPT:
    model = GPT(ModelConfig(**{**SHAPE, **options}), 50, EOT)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return model


def naming(name: str) -> Callable[[str], str]:
    """Add `name` to the message of a failed comparison."""
    return lambda message: f"{name}: {message}"


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "flex_is_best", lambda device, tokens, head_size: tokens > 128)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda query, key, value: None)
    torch.compiler.reset()


@pytest.mark.parametrize("T", LENGTHS)
def test_blocks_hold_the_mask(T: int) -> None:
    blocks = document_blocks(documents(T))
    assert torch.equal(dense_mask(blocks), expected_mask(documents(T)))


@pytest.mark.parametrize("T", LENGTHS)
def test_blocks_of_other_documents_and_of_the_future_are_skipped(T: int) -> None:
    """Each block is listed where it holds a pair, and as full where it holds nothing else."""
    blocks, N = document_blocks(documents(T)), (T + 127) // 128
    padded = F.pad(expected_mask(documents(T)), (0, N * 128 - T, 0, N * 128 - T))
    pairs = padded.view(3, N, 128, N, 128).sum(dim=(2, 4))
    assert blocks.full_kv_num_blocks is not None
    assert blocks.full_kv_indices is not None
    for counts, indices, expected in (
        (blocks.kv_num_blocks, blocks.kv_indices, (pairs > 0) & (pairs < 128 * 128)),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, pairs == 128 * 128),
    ):
        for b in range(3):
            for row in range(N):
                listed = indices[b, 0, row, : int(counts[b, 0, row])].tolist()
                assert sorted(listed) == expected[b, row].nonzero().flatten().tolist()


@pytest.mark.parametrize(("T", "kv_heads"), [(129, 1), (300, 2), (256, 6)])
@pytest.mark.usefixtures("flex_on_cpu")
def test_it_equals_sdpa_with_gradients(T: int, kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(T)
    sizes = ((3, T, heads, 16) for heads in (6, kv_heads, kv_heads))
    q, k, v = (
        torch.randn(size, dtype=torch.float64, generator=draw).transpose(1, 2).requires_grad_() for size in sizes
    )
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=expected_mask(documents(T)), enable_gqa=True)
    compiled = torch.compile(flex_attention, fullgraph=True, backend="aot_eager")
    by_blocks = compiled(q, k, v, block_mask=document_blocks(documents(T)), enable_gqa=True)
    torch.testing.assert_close(by_blocks, whole)
    weight = torch.randn(whole.shape, dtype=whole.dtype, generator=torch.Generator().manual_seed(0))
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), weight) for y in (by_blocks, whole)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("flex_on_cpu")
def test_compiled_blocks_take_it_and_give_the_same_gradients(variant: str) -> None:
    model = make(**VARIANTS[variant])
    by_blocks = copy.deepcopy(model)
    by_blocks.blocks_are_compiled = True
    operators: set[object] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        operators.update(node.target for node in graph.graph.nodes)
        return graph.forward

    for block in by_blocks.blocks:
        block.compile(fullgraph=True, backend=backend)
    tokens = some_tokens(2, 300)
    losses = []
    for m in (model, by_blocks):
        losses.append(m(tokens, tokens.roll(-1, dims=1)))
        losses[-1].mean().backward()
    assert torch.ops.higher_order.flex_attention in operators
    assert F.scaled_dot_product_attention not in operators
    torch.testing.assert_close(losses[1], losses[0])
    for (name, p), q in zip(model.named_parameters(), by_blocks.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=naming(name))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("flex_on_cpu")
def test_a_block_that_runs_eagerly_takes_the_whole_mask(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torch.compiler.set_stance("force_eager"). FlexAttention would store all scores."""
    model, tokens = make(**VARIANTS[variant]), some_tokens(2, 300)
    expected = model(tokens)
    model.blocks_are_compiled = True
    monkeypatch.delattr(gpt, "flex_attention")
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize(
    ("compiled", "training", "dropout", "cached", "tokens", "by_blocks"),
    [
        (True, True, 0.0, False, 300, True),
        (True, False, 0.1, False, 300, True),
        (True, True, 0.1, False, 300, False),
        (True, False, 0.0, True, 300, False),
        (True, True, 0.0, False, 128, False),
        (False, True, 0.0, False, 300, False),
    ],
)
@pytest.mark.usefixtures("flex_on_cpu")
def test_which_attention_is_taken(
    compiled: bool, training: bool, dropout: float, cached: bool, tokens: int, by_blocks: bool
) -> None:
    model = make(dropout=dropout).train(training)
    model.blocks_are_compiled = compiled
    masks = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: masks.append(inputs[2]))
    with torch.no_grad():
        model(some_tokens(1, tokens), cache=KVCache(model.config) if cached else None)
    assert [isinstance(mask, BlockMask) for mask in masks] == [by_blocks]


def test_a_cpu_never_takes_it() -> None:
    model = make()
    model.blocks_are_compiled = True
    masks = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: masks.append(inputs[2]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(some_tokens(1, 300))
    assert isinstance(masks[0], Tensor)


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "head_size", "best"),
    [
        (GPU, torch.bfloat16, 1024, 64, True),
        (GPU, torch.bfloat16, 129, 128, True),
        (GPU, torch.bfloat16, 1024, 16, True),
        (GPU, torch.bfloat16, 1024, 8, False),
        (GPU, torch.bfloat16, 1024, 192, False),
        (GPU, torch.bfloat16, 128, 64, False),
        (GPU, torch.float32, 1024, 64, False),
        (torch.device("cpu"), torch.bfloat16, 1024, 64, False),
        (torch.device("mps"), torch.bfloat16, 1024, 64, False),
    ],
)
def test_where_its_kernels_are_best(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    head_size: int,
    best: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: dtype != torch.float32)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device_type: dtype)
    assert flex_is_best(device, tokens=tokens, head_size=head_size) == best
