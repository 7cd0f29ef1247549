"""The names of our parameters in the standard architectures, and their layout there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distgpt.config import ModelConfig

GPT2_NAMES = {
    "token_embedding": ("transformer.wte",),
    "position_embedding": ("transformer.wpe",),
    "attention_norm": ("transformer.h.{}.ln_1",),
    "attention.qkv": ("transformer.h.{}.attn.c_attn",),
    "attention.output": ("transformer.h.{}.attn.c_proj",),
    "mlp_norm": ("transformer.h.{}.ln_2",),
    "mlp.up": ("transformer.h.{}.mlp.c_fc",),
    "mlp.down": ("transformer.h.{}.mlp.c_proj",),
    "norm": ("transformer.ln_f",),
    "head": ("lm_head",),
}
LLAMA_NAMES = {
    "token_embedding": ("model.embed_tokens",),
    "attention_norm": ("model.layers.{}.input_layernorm",),
    "attention.qkv": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "attention.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "attention.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "attention.output": ("model.layers.{}.self_attn.o_proj",),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm",),
    "mlp.gate": ("model.layers.{}.mlp.gate_proj",),
    "mlp.up": ("model.layers.{}.mlp.up_proj",),
    "mlp.down": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "head": ("lm_head",),
}
# GPT-2's projections are its Conv1D, whose weight is (in, out), where that of nn.Linear is (out, in).
TRANSPOSED = ("attention.qkv.weight", "attention.output.weight", "mlp.up.weight", "mlp.down.weight")


@dataclass(frozen=True)
class Stored:
    """The place of a parameter: its rows are those of the tensors `names`, one after the other.

    `rows`: their numbers of rows, if there are several. `transposed`: there is one, whose columns are the rows.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...] = ()
    transposed: bool = False

    def split(self, parameter: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors that store a parameter, contiguous."""
        parts = (
            torch.split(parameter, list(self.rows)) if self.rows else (parameter.T if self.transposed else parameter,)
        )
        return {name: part.contiguous() for name, part in zip(self.names, parts, strict=True)}


Layout = Callable[[str, ModelConfig], Stored]


def layout_of(*, plain: bool) -> Layout:
    """Return the function that tells where a parameter of a model is stored: under our own names, or standard ones."""
    return stored_plainly if plain else stored_as_standard


def stored_plainly(parameter: str, model: ModelConfig) -> Stored:
    """Return where a parameter is stored under its own name."""
    return Stored((parameter,))


def stored_as_standard(parameter: str, model: ModelConfig) -> Stored:
    """Return where a parameter, such as blocks.3.attention.qkv.weight, is stored in the standard architecture.

    Raises KeyError if that has no such parameter.
    """
    layer, module = "", parameter
    if parameter.startswith("blocks."):
        _, layer, module = parameter.split(".", 2)
    module, _, kind = module.rpartition(".")
    is_gpt2 = model.position == "learned"
    names = tuple(f"{name.format(layer)}.{kind}" for name in (GPT2_NAMES if is_gpt2 else LLAMA_NAMES)[module])
    heads = (model.n_head, *[model.n_kv_head or model.n_head] * 2)
    rows = tuple(count * model.size_of_heads for count in heads) if len(names) > 1 else ()
    return Stored(names, rows, transposed=is_gpt2 and f"{module}.{kind}" in TRANSPOSED)
