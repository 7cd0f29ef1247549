"""The standard architectures that a model can have: GPT-2, Llama, Qwen2 and Qwen3, in the terms of Hugging Face.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from distgpt.config import ModelConfig, from_dict
from distgpt.errors import UsageError

GPT2, LLAMA, QWEN2, QWEN3 = "gpt2", "llama", "qwen2", "qwen3"
CLASSES = {
    GPT2: "GPT2LMHeadModel",
    LLAMA: "LlamaForCausalLM",
    QWEN2: "Qwen2ForCausalLM",
    QWEN3: "Qwen3ForCausalLM",
}
# GPT-2's "gelu_new" is the approximation with tanh, which has several names.
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
GPT2_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu"}
QWEN3_HEAD_SIZE = 128  # where its config.json does not say


def architecture_of(model: ModelConfig) -> str:
    """Return the standard architecture that computes what `model` does. Raises UsageError with the reasons if none."""
    if model.position == "learned":
        name = GPT2
        reasons = {
            f"model.norm is {model.norm}, and GPT-2 has layernorm": model.norm != "layernorm",
            f"model.mlp is {model.mlp}, and GPT-2 has gelu or relu": model.mlp not in GPT2_ACTIVATIONS,
            "model.qk_norm is true, and GPT-2 has none": model.qk_norm,
            "model.head_size is not model.n_embd / model.n_head, as in GPT-2": model.size_of_heads * model.n_head
            != model.n_embd,
            "model.n_kv_head is not model.n_head, and GPT-2 has no grouped heads": model.n_kv_head
            not in (0, model.n_head),
        }
    else:
        # Llama has biases everywhere or nowhere, Qwen2 in the projections to queries, keys and values.
        name = QWEN3 if model.qk_norm else QWEN2 if model.qkv_bias and not model.bias else LLAMA
        reasons = {
            f"model.norm is {model.norm}, and Llama and Qwen have rmsnorm": model.norm != "rmsnorm",
            f"model.mlp is {model.mlp}, and Llama and Qwen have swiglu": model.mlp != "swiglu",
            "model.qk_norm is true together with biases, and Qwen3 has none": model.qk_norm
            and (model.qkv_bias or model.bias),
        }
    reasons["model.head_bias is true, and no output projection there has a bias"] = (
        model.head_bias and not model.tied_head
    )
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UsageError("; ".join(found))
    return name


def with_all_biases(model: ModelConfig) -> ModelConfig:
    """Return `model` with all biases of its standard architecture. Those that `model` lacks are written as zeros."""
    if model.position == "learned":
        return replace(model, qkv_bias=True, bias=True)
    return replace(model, qkv_bias=model.qkv_bias or model.bias)


def config_json(model: ModelConfig, *, vocab_size: int, eot_id: int | None) -> dict[str, Any]:
    """Return the content of config.json for a `model` with explicit sizes, see with_explicit_sizes().

    Raises UsageError as architecture_of() does.
    """
    architecture = architecture_of(model)
    shared = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tied_head,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": "float32",
    }
    if architecture == GPT2:
        return shared | {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_embd": model.n_embd,
            "n_positions": model.block_size,
            "n_ctx": model.block_size,  # the name of older programs
            "n_inner": model.mlp_hidden,
            "activation_function": GPT2_ACTIVATIONS[model.mlp],
            "layer_norm_epsilon": model.norm_eps,
            "attn_pdrop": model.dropout,
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout if model.embedding_dropout else 0.0,
        }
    return shared | {
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_kv_head,
        "head_dim": model.head_size,
        "hidden_size": model.n_embd,
        "intermediate_size": model.mlp_hidden,
        "max_position_embeddings": model.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.dropout,
        "use_sliding_window": False,
    }


def read_config_json(content: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Return the model that a config.json describes. Keys that only matter in training have their defaults.

    Raises UsageError that names `source` for another model.
    """
    kind = content.get("model_type")
    if kind not in CLASSES:
        raise UsageError(f"{source} is of a model of type {kind!r}: distgpt reads {', '.join(CLASSES)}")
    try:
        values, reasons = _read_gpt2(content) if kind == GPT2 else _read_llama(content)
    except KeyError as error:
        raise UsageError(f"{source} does not say {error}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"{source} is not valid: {error}") from None
    reasons["its weights are quantized"] = bool(content.get("quantization_config"))
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UsageError(f"{source} is of a model that distgpt does not have: {'; '.join(found)}")
    return from_dict({"model": values}, source=source).model


def _read_gpt2(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return the values of a ModelConfig, and possible reasons to refuse it: each is true if it holds."""
    activation = content.get("activation_function", "gelu_new")
    tied = content.get("tie_word_embeddings", True)
    values = {
        "n_layer": content["n_layer"],
        "n_head": content["n_head"],
        "n_embd": content["n_embd"],
        "block_size": content["n_positions"],
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": content.get("layer_norm_epsilon", 1e-5),
        "mlp": ACTIVATIONS.get(activation, "gelu"),
        "mlp_hidden": content.get("n_inner") or 0,
        "qkv_bias": True,
        "bias": True,
        "tied_head": tied,
        "head_bias": False,
        "embedding_dropout": True,
        "init": "scaled",
    }
    return values, {
        f"its activation is {activation}": activation not in ACTIVATIONS,
        "its attention is not scaled by the head size alone": not content.get("scale_attn_weights", True)
        or bool(content.get("scale_attn_by_inverse_layer_idx")),
    }


def _read_llama(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bool]]:
    """Do the same for Llama, Qwen2 and Qwen3."""
    kind = content["model_type"]
    heads, width = content["num_attention_heads"], content["hidden_size"]
    head_size = content.get("head_dim") or (QWEN3_HEAD_SIZE if kind == QWEN3 else width // heads)
    # transformers 5 keeps the two in rope_parameters.
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    theta = content.get("rope_theta", rope.get("rope_theta", 10000.0))
    scaling = rope.get("rope_type", rope.get("type", "default"))
    attention_bias, mlp_bias = content.get("attention_bias", False), content.get("mlp_bias", False)
    activation = content.get("hidden_act", "silu")
    values = {
        "n_layer": content["num_hidden_layers"],
        "n_head": heads,
        "n_kv_head": content.get("num_key_value_heads") or heads,
        "n_embd": width,
        "head_size": head_size,
        "block_size": content["max_position_embeddings"],
        "position": "rope",
        "rope_theta": theta,
        "norm": "rmsnorm",
        "norm_eps": content.get("rms_norm_eps", 1e-6),
        "mlp": "swiglu",
        "mlp_hidden": content["intermediate_size"],
        "qkv_bias": kind == QWEN2 or attention_bias,
        "bias": mlp_bias,
        "qk_norm": kind == QWEN3,
        "tied_head": content.get("tie_word_embeddings", False),
        "head_bias": False,
        "init": "scaled",
    }
    return values, {
        f"its activation is {activation}": activation != "silu",
        f"its rotary frequencies are scaled ({scaling})": scaling != "default",
        "its attention has biases and its feed-forward network has none, or the reverse": attention_bias != mlp_bias,
        "its attention has a sliding window": bool(content.get("use_sliding_window")),
    }
