"""A micro-batch takes the memory that is planned for it: the allocations of tensors are counted."""

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distgpt.config import Config, resolve
from distgpt.distributed.memory import MemoryModel, layer_bytes, state_bytes
from distgpt.distributed.parallelize import recompute_blocks
from distgpt.model.gpt import GPT

VOCABULARY = 50_257
MODERN = ("--model.position=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu", "--model.qk_norm")
VARIANTS = {
    "gpt2": (),
    "modern": MODERN,
    "relu": ("--model.mlp=relu",),
    "relu2": ("--model.mlp=relu2",),
    "documents": ("--model.document_mask",),
    "recomputed": ("--parallel.activation_checkpoint",),
    "chunked": ("--model.loss_chunk=256",),
    "float32": ("--train.dtype=float32",),
}


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are alive, besides those of `known`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}  # noqa: SLF001 (its identity)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        identity, size = storage._cdata, storage.nbytes()  # noqa: SLF001
        if identity in self._storages:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._storages[identity]

        self._storages[identity] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def counted_peak(config: Config, sequences: int) -> int:
    """Return the most bytes that a second micro-batch takes besides weights and gradients. Computes nothing."""
    with FakeTensorMode():
        model = GPT(config.model, VOCABULARY, eot_id=0)
        if config.parallel.activation_checkpoint:
            recompute_blocks(model)
        tokens_BT = torch.zeros(sequences, config.model.block_size, dtype=torch.int64)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        known = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        with LiveBytes(known) as live:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.train.dtype == "bfloat16"):
                loss = model(tokens_BT, tokens_BT).mean()
            loss.backward()
    return int(live.peak)


def attention_of_gpus(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, *, mask: Tensor | None, dropout_p: float, generators: object
) -> Tensor:
    """Attend in one fused kernel, which keeps no weights."""
    causal = mask is None
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, dropout_p=dropout_p, is_causal=causal)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_micro_batch_takes_what_is_planned(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU has a kernel for it, which keeps as much as that of LayerNorm; a CPU composes it from several operations.
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps))
    # Only a CPU attends in blocks, and keeps their weights.
    monkeypatch.setattr("distgpt.model.gpt.attention_in_blocks", attention_of_gpus)
    config = resolve(["gpt2-124m", "--model.n_layer=4", "--train.dtype=bfloat16", *VARIANTS[variant]], {})
    memory = MemoryModel(config, VOCABULARY, 4 if variant == "float32" else 2)
    planned = memory.need(4, shards=1) - state_bytes(config, VOCABULARY)
    assert planned == pytest.approx(counted_peak(config, 4), rel=0.05)


def test_a_block_of_gpt2_keeps_36_bytes_per_token_and_width() -> None:
    model = resolve(["gpt2-124m"], {}).model
    assert layer_bytes(model, 2) == 36 * model.n_embd
    assert layer_bytes(model, 4) == 64 * model.n_embd


def test_sharding_divides_the_state_and_what_is_kept_costs_memory() -> None:
    memory = MemoryModel(resolve(["modern-7b"], {}), VOCABULARY, 2)
    one, eight = (memory.need(1, shards=shards) for shards in (1, 8))
    assert one > 8 * memory.parameters + eight
    kept = memory.need(1, shards=8, keep_weights=True) - eight
    whole = memory.need(1, shards=8, whole_gradients=True) - eight
    assert 1.5 * memory.parameters < kept <= 2 * memory.parameters
    assert 3 * memory.parameters < whole <= 4 * memory.parameters
