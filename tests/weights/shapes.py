"""Configs of small models, by the architecture that they have in transformers."""

_ROPE = ("--model.position=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu", "--model.head_bias=false")
_SIZES = ("--model.n_layer=2", "--model.n_head=4", "--model.n_embd=32", "--model.block_size=24", "--optim.lr=1e-2")
_NONE = ("--model.bias=false", "--model.qkv_bias=false")
_GPT2 = ("--model.mlp=gelu", "--model.qkv_bias=true", "--model.tied_head=true", "--model.vocab_multiple=64")

SHAPES = {
    "gpt2": (*_SIZES, *_GPT2),
    "gpt2 without biases": (*_SIZES, *_GPT2, *_NONE),
    "gpt2 with its own head": (*_SIZES, *_GPT2, "--model.tied_head=false", "--model.head_bias=false"),
    "gpt2 with relu": (*_SIZES, *_GPT2, "--model.mlp=relu", "--model.mlp_hidden=48", "--model.qkv_bias=false"),
    "llama": (*_SIZES, *_ROPE, *_NONE, "--model.n_kv_head=2", "--model.norm_eps=1e-5", "--model.rope_theta=5000"),
    "llama with biases": (*_SIZES, *_ROPE, "--model.bias=true", "--model.tied_head=true"),
    "qwen2": (*_SIZES, *_ROPE, "--model.bias=false", "--model.qkv_bias=true", "--model.n_kv_head=1"),
    "qwen3 with wide heads": (*_SIZES, *_ROPE, *_NONE, "--model.qk_norm=true", "--model.head_size=12"),
    "qwen3": (*_SIZES, *_ROPE, *_NONE, "--model.qk_norm=true", "--model.n_kv_head=2", "--model.vocab_multiple=64"),
}
# Models that no standard architecture computes: squared ReLU with RoPE and QK-norm, and a bias in the head.
OTHERS = {
    "quickstart": (*_SIZES, *_ROPE, *_NONE, "--model.qk_norm=true", "--model.mlp=relu2", "--model.vocab_multiple=16"),
    "seed": (*_SIZES, "--model.head_bias=true"),
}
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"} | {
    "qwen3": "Qwen3ForCausalLM"
}
