"""The network: each option against a reference computation by hand, and what the parts promise together."""

import copy
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distgpt.config import ModelConfig, resolve
from distgpt.errors import UsageError
from distgpt.model.gpt import GPT, MLP, Block, KVCache, RMSNorm, count_parameters, make_norm, rope_tables, rotate

VOCAB = 37
EOT = 3
SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16}
MODERN: dict[str, Any] = {
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "n_kv_head": 2,
    "qk_norm": True,
    "bias": False,
    "head_bias": False,
    "init": "scaled",
}
GPT2: dict[str, Any] = {"mlp": "gelu", "qkv_bias": True, "tied_head": True, "init": "scaled", "vocab_multiple": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "seed": {},
    "gpt2": GPT2,
    "modern": MODERN,
    "relu2": {"mlp": "relu2", "qk_norm": True, "bias": False},
    "documents": {"position": "rope", "document_mask": True, "n_kv_head": 1},
    "chunked": {"loss_chunk": 5},
    "wide heads": {"head_size": 14, "position": "rope", "n_kv_head": 1},
}


def make(*, spread: float = 5.0, seed: int = 0, **options: Any) -> GPT:
    """A small model with weights `spread` times larger than initial ones, so that every part changes the output."""
    model = GPT(ModelConfig(**{**SHAPE, **options}), VOCAB, EOT)
    model.init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(spread)
            else:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def blocks(model: GPT) -> list[Block]:
    return [cast(Block, block) for block in model.blocks]


def naming(name: str) -> Callable[[str], str]:
    """Add `name` to the message of a failed comparison."""
    return lambda message: f"{name}: {message}"


def some_tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# A plain reference implementation of the seed model: one module for each head, an explicit mask.


class ReferenceHead(nn.Module):
    def __init__(self, n_embd: int, head_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        k, q, v = self.key(x), self.query(x), self.value(x)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        weights = weights.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return cast(Tensor, F.softmax(weights, dim=-1) @ v)


class ReferenceBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ReferenceHead(n_embd, n_embd // n_head) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)
        self.net = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln1(x)
        x = x + self.proj(torch.cat([head(h) for head in self.heads], dim=-1))
        out: Tensor = x + self.net(self.ln2(x))
        return out


class ReferenceGPT(nn.Module):
    def __init__(self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(ReferenceBlock(n_embd, n_head) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(index) + self.positions(torch.arange(index.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def reference_parameters(reference: ReferenceGPT) -> dict[str, list[nn.Parameter]]:
    """Map the name of each parameter of GPT to the parameters of the reference that it stacks by rows."""
    pairs: dict[str, nn.Module] = {
        "token_embedding": reference.tokens,
        "position_embedding": reference.positions,
        "norm": reference.ln_f,
        "head": reference.lm_head,
    }
    stacked: dict[str, list[nn.Parameter]] = {}
    for i, block in enumerate(reference.blocks):
        assert isinstance(block, ReferenceBlock)
        pairs |= {
            f"blocks.{i}.attention_norm": block.ln1,
            f"blocks.{i}.attention.output": block.proj,
            f"blocks.{i}.mlp_norm": block.ln2,
            f"blocks.{i}.mlp.up": block.net[0],
            f"blocks.{i}.mlp.down": block.net[2],
        }
        parts = ("query", "key", "value")
        stacked[f"blocks.{i}.attention.qkv.weight"] = [getattr(h, p).weight for p in parts for h in block.heads]
    named = {f"{name}.{n}": [p] for name, module in pairs.items() for n, p in module.named_parameters()}
    return named | stacked


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_seed_preset_equals_the_reference(spread: float) -> None:
    config = resolve(["seed"], {}).model
    model = GPT(config, 65).eval()
    model.init_weights(1337)
    reference = ReferenceGPT(65, config.n_layer, config.n_head, config.n_embd, config.block_size)
    theirs = reference_parameters(reference)
    ours = dict(model.named_parameters())
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parts in theirs.items():
            noise = torch.randn(ours[name].shape, generator=torch.Generator().manual_seed(len(name)))
            if ours[name].ndim == 1:
                ours[name].add_(0.1 * noise)
            else:
                ours[name].mul_(spread)
            for part, value in zip(parts, ours[name].chunk(len(parts)), strict=True):
                part.copy_(value)
    tokens, targets = some_tokens(2, 48, vocab=65), some_tokens(2, 48, seed=1, vocab=65)
    logits, loss = reference(tokens, targets)
    torch.testing.assert_close(model(tokens), logits, atol=1e-5, rtol=1e-5)
    our_loss = model(tokens, targets).mean()
    torch.testing.assert_close(our_loss, loss, atol=1e-5, rtol=0)
    loss.backward()
    our_loss.backward()
    for name, parts in theirs.items():
        gradient = torch.cat([part.grad for part in parts if part.grad is not None])
        torch.testing.assert_close(ours[name].grad, gradient, atol=1e-5, rtol=1e-5, msg=naming(name))


def test_the_seed_preset_has_the_references_parameters() -> None:
    assert count_parameters(resolve(["seed"], {}).model, 65) == 10_788_929


def test_a_tied_head_and_a_document_mask_add_no_parameters() -> None:
    config = ModelConfig(**SHAPE, tied_head=True, document_mask=True)
    assert count_parameters(config, VOCAB) == sum(p.numel() for p in make(tied_head=True).parameters())
    assert all(p.device.type == "cpu" for p in GPT(ModelConfig(**SHAPE), VOCAB).parameters())


def test_bias_options_select_the_biases() -> None:
    def biased(**options: Any) -> set[str]:
        names = (name for name, _ in make(n_layer=1, **options).named_parameters())
        return {name.removeprefix("blocks.0.").removesuffix(".bias") for name in names if name.endswith(".bias")}

    projections = {"attention.output", "mlp.up", "mlp.down"}
    norms = {"attention_norm", "mlp_norm", "norm"}
    assert biased() == projections | norms | {"head"}
    assert biased(bias=False) == {"head"}
    assert biased(bias=False, head_bias=False, qkv_bias=True) == {"attention.qkv"}
    assert biased(tied_head=True, mlp="swiglu", norm="rmsnorm") == projections | {"mlp.gate"}


# Initial values


def test_initial_values() -> None:
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_embd=128, block_size=64, init="scaled"), 101)
    model.init_weights(7)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert (p == 0).all(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            assert p.std().item() == pytest.approx(0.01 if residual else 0.02, rel=0.03), name
            assert p.mean().item() == pytest.approx(0, abs=0.001), name
    assert not torch.equal(model.get_parameter("blocks.0.mlp.up.weight"), model.get_parameter("blocks.1.mlp.up.weight"))


def test_normal_init_does_not_scale_residual_projections() -> None:
    value = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=128), VOCAB).initial_value("blocks.7.mlp.down.weight", seed=0)
    assert value.std().item() == pytest.approx(0.02, rel=0.03)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    model, again = GPT(ModelConfig(**SHAPE), VOCAB), GPT(ModelConfig(**SHAPE), VOCAB)
    names = [name for name, _ in model.named_parameters()]
    torch.manual_seed(1)
    model.init_weights(5)
    torch.manual_seed(2)
    values = {name: again.initial_value(name, seed=5) for name in reversed(names)}
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name]), name
        assert values[name].dtype == torch.float32
    assert not torch.equal(model.initial_value("head.weight", seed=6), values["head.weight"])


def test_initial_values_do_not_depend_on_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self._wrapped = wrapped

    model = GPT(ModelConfig(**SHAPE), VOCAB)
    plain = model.initial_value("blocks.1.mlp.up.weight", seed=0)
    model.blocks[1] = Wrapper(model.blocks[1])
    assert torch.equal(model.initial_value("blocks.1._wrapped.mlp.up.weight", seed=0), plain)


def test_initial_values_do_not_depend_on_padding() -> None:
    plain, padded = GPT(ModelConfig(**SHAPE), VOCAB), GPT(ModelConfig(**SHAPE, vocab_multiple=64), VOCAB)
    for name in ("token_embedding.weight", "head.weight"):
        value = padded.initial_value(name, seed=0)
        assert torch.equal(value[:VOCAB], plain.initial_value(name, seed=0))
        assert value.shape == (64, 32)
        assert (value[VOCAB:] == 0).all()


@pytest.mark.parametrize("options", [{}, MODERN, GPT2])
def test_a_model_on_the_meta_device_can_be_initialized(options: dict[str, Any]) -> None:
    config = ModelConfig(**{**SHAPE, **options})
    direct = GPT(config, VOCAB)
    direct.init_weights(3)
    with torch.device("meta"):
        model = GPT(config, VOCAB)
        values = {name: model.initial_value(name, seed=3) for name, _ in model.named_parameters()}
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(values[name])
    tokens = some_tokens(2, 16)
    assert torch.equal(model(tokens), direct(tokens))


# Every variant


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_the_future_and_each_sees_the_past(variant: str) -> None:
    model = make(**VARIANTS[variant])
    tokens = some_tokens(1, 16)
    tokens[tokens == EOT] = 4
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % VOCAB
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert (difference[:7] < 1e-5).all()
    assert (difference[7:] > 1e-4).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    model = make(**VARIANTS[variant]).train()
    model(some_tokens(8, 16), some_tokens(8, 16, seed=1)).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert (p.grad[:VOCAB] != 0).any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_the_mean_cross_entropy_of_each_sequence(variant: str) -> None:
    model = make(**VARIANTS[variant])
    tokens, targets = some_tokens(3, 16), some_tokens(3, 16, seed=1)
    logits = model(tokens)
    assert logits.shape == (3, 16, VOCAB)
    expected = torch.stack([F.cross_entropy(logits[b], targets[b]) for b in range(3)])
    torch.testing.assert_close(model(tokens, targets), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_autocast_gives_a_close_float32_loss(variant: str) -> None:
    model = make(**VARIANTS[variant])
    tokens, targets = some_tokens(3, 16), some_tokens(3, 16, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens, targets), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_in_bfloat16_computes_its_loss_in_float32(variant: str) -> None:
    model = make(**VARIANTS[variant]).bfloat16()
    tokens, targets = some_tokens(3, 16), some_tokens(3, 16, seed=1)
    expected = F.cross_entropy(model(tokens).float().transpose(1, 2), targets, reduction="none").mean(dim=1)
    torch.testing.assert_close(model(tokens, targets), expected)


@pytest.mark.parametrize("variant", ["modern", "documents"])
def test_compiled_blocks_give_the_same_gradients(variant: str) -> None:
    model = make(**VARIANTS[variant])
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    tokens, targets = some_tokens(2, 16), some_tokens(2, 16, seed=1)
    for m in (model, compiled):
        m(tokens, targets).mean().backward()
    for (name, p), q in zip(model.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(q[1].grad, p.grad, msg=naming(name))


def test_a_block_with_dropout_compiles_as_one_graph() -> None:
    model = make(dropout=0.5).train()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    model(some_tokens(2, 16), some_tokens(2, 16, seed=1)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 1, 1, 4, 5]])
def test_forwards_with_a_cache_equal_one_forward(variant: str, pieces: list[int]) -> None:
    model = make(**VARIANTS[variant])
    tokens = some_tokens(2, 16)
    tokens[0, 4] = tokens[0, 9] = tokens[1, 5] = EOT
    cache = KVCache(model.config)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache) for piece in torch.split(tokens, pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(tokens), atol=1e-5, rtol=1e-5)
    assert cache.length == 16
    with pytest.raises(ValueError, match="17 tokens do not fit in block_size = 16"):
        model(tokens[:, :1], cache=cache)


def test_more_than_block_size_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens do not fit in block_size = 16"):
        make()(some_tokens(1, 17))


# One option at a time


def test_dropout_applies_to_attention_weights_and_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, **_: Any) -> Tensor:
        rates.append(dropout_p)
        return v

    model = make(dropout=0.25)
    branches = [m for block in blocks(model) for m in (block.attention.output_dropout, block.mlp.dropout)]
    assert [m.p for m in branches] == [0.25] * 4
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr("distgpt.model.gpt.attention_in_blocks", attention)
    tokens = some_tokens(1, 16)
    model.train()(tokens)
    model.eval()(tokens)
    assert rates == [0.25, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_branch_dropout_zeroes_the_configured_share(branch: str) -> None:
    block = blocks(make(n_embd=256, dropout=0.25).train())[0]
    x = torch.randn(4, 16, 256, generator=torch.Generator().manual_seed(0))
    out = block.mlp(x) if branch == "mlp" else block.attention(x, None, None, None)
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("embedding_dropout", [True, False])
def test_embedding_dropout_is_optional(embedding_dropout: bool) -> None:
    model = make(n_layer=0, dropout=0.5, embedding_dropout=embedding_dropout)
    tokens = some_tokens(1, 16)
    assert torch.equal(model(tokens), model.train()(tokens)) is not embedding_dropout


def test_grouped_heads_share_keys_and_values() -> None:
    grouped, full = make(n_kv_head=2), make(n_kv_head=0)
    state = grouped.state_dict()
    for i in range(2):
        name = f"blocks.{i}.attention.qkv.weight"
        q, k, v = state[name].split((32, 16, 16))
        k, v = (w.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32) for w in (k, v))
        state[name] = torch.cat((q, k, v))
    full.load_state_dict(state)
    tokens = some_tokens(2, 16)
    torch.testing.assert_close(grouped(tokens), full(tokens))


def test_rope_is_a_rotation_that_depends_on_distance_alone() -> None:
    config = ModelConfig(**SHAPE, position="rope", rope_theta=100.0)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).unbind()
    cos, sin = rope_tables(torch.arange(12), config)

    def score(m: int, n: int) -> float:
        return (rotate(q, cos[m], sin[m]) * rotate(k, cos[n], sin[n])).sum().item()

    assert score(3, 1) == pytest.approx(score(11, 9), abs=1e-5)
    assert abs(score(3, 1) - score(4, 1)) > 1e-3
    as_complex = torch.complex(q[0, :4], q[0, 4:])
    turned = as_complex * torch.polar(torch.ones(4), 5 * torch.tensor([1.0, 100**-0.25, 0.1, 100**-0.75]))
    expected = torch.cat((turned.real, turned.imag))
    torch.testing.assert_close(rotate(q, cos[5], sin[5])[0], expected)


def test_with_qk_norm_the_size_of_queries_and_keys_does_not_matter() -> None:
    tokens = some_tokens(1, 16)
    for qk_norm in (True, False):
        model = make(n_layer=1, qk_norm=qk_norm)
        before = model(tokens)
        with torch.no_grad():
            blocks(model)[0].attention.qkv.weight[:64] *= 3
        assert torch.allclose(before, model(tokens), atol=1e-3) is qk_norm


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(4, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    x = torch.tensor([1.0, -1.0, 3.0, 5.0])
    torch.testing.assert_close(norm(x), x / 3.0 * norm.weight)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_take_parameters_gathered_in_bfloat16(kind: Literal["layernorm", "rmsnorm"]) -> None:
    norm = make_norm(ModelConfig(n_embd=8, norm=kind))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = norm(x)
    assert torch.equal(norm.bfloat16()(x), expected)


@pytest.mark.parametrize("kind", ["relu", "gelu", "relu2", "swiglu"])
def test_mlp_by_hand(kind: Literal["relu", "gelu", "relu2", "swiglu"]) -> None:
    mlp = MLP(ModelConfig(n_embd=6, mlp=kind, mlp_hidden=10))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    h = mlp.up(x)
    if mlp.gate is not None:
        gate = mlp.gate(x)
        h = h * gate / (1 + torch.exp(-gate))
    elif kind == "gelu":
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    else:
        h = h.clamp(min=0) ** (2 if kind == "relu2" else 1)
    torch.testing.assert_close(mlp(x), mlp.down(h))


def test_mlp_width() -> None:
    assert MLP(ModelConfig(n_embd=384)).up.out_features == 1536
    assert MLP(ModelConfig(n_embd=384, mlp="swiglu")).up.out_features == 1024
    assert MLP(ModelConfig(n_embd=390, mlp="swiglu")).up.out_features == 1088


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_document_mask_hides_other_documents(n_kv_head: int) -> None:
    """Rotary positions are relative, so a document gives the same logits in a row of several and alone."""
    model = make(position="rope", document_mask=True, n_kv_head=n_kv_head)
    tokens = some_tokens(2, 16)
    tokens[tokens == EOT] = 4
    tokens[0, 5] = tokens[0, 11] = tokens[1, 0] = EOT
    logits = model(tokens)
    for row, start, end in [(0, 0, 6), (0, 6, 12), (0, 12, 16), (1, 0, 1), (1, 1, 16)]:
        alone = model(tokens[row : row + 1, start:end])
        torch.testing.assert_close(logits[row : row + 1, start:end], alone, atol=1e-5, rtol=1e-4)
    unmasked = make(position="rope", n_kv_head=n_kv_head)(tokens)
    torch.testing.assert_close(unmasked[0, :6], logits[0, :6], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(unmasked[0, 6:], logits[0, 6:], atol=1e-2)


def test_document_mask_needs_an_end_of_text_id() -> None:
    with pytest.raises(UsageError, match="document_mask"):
        GPT(ModelConfig(**SHAPE, document_mask=True), VOCAB, None)


def test_a_tied_head_is_the_embedding() -> None:
    model = make(tied_head=True, n_layer=0)
    assert not any("head" in name for name, _ in model.named_parameters())
    tokens = torch.tensor([[5, 6]])
    assert model.position_embedding is not None
    x = model.norm(model.token_embedding(tokens) + model.position_embedding(torch.arange(2)))
    torch.testing.assert_close(model(tokens), x @ model.token_embedding.weight.T)


@pytest.mark.parametrize("options", [{}, {"tied_head": True}, {"vocab_multiple": 64}])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_the_chunked_loss_equals_the_loss(options: dict[str, Any], chunk: int) -> None:
    whole, chunked = make(**options), make(**options, loss_chunk=chunk)
    tokens, targets = some_tokens(3, 16), some_tokens(3, 16, seed=1)
    weight_B = torch.tensor([1.0, 2.0, 3.0])
    for model in (whole, chunked):
        (model(tokens, targets) * weight_B).sum().backward()
    torch.testing.assert_close(chunked(tokens, targets), whole(tokens, targets))
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=naming(name))


def test_the_chunked_loss_stores_no_logits() -> None:
    def largest_stored(chunk: int) -> int:
        stored: list[int] = []

        def pack(x: Tensor) -> Tensor:
            if not isinstance(x, nn.Parameter):
                stored.append(x.numel())
            return x

        model = GPT(ModelConfig(**SHAPE, loss_chunk=chunk), 5000)
        model.init_weights(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(some_tokens(2, 16), some_tokens(2, 16))
        return max(stored)

    assert largest_stored(0) == 2 * 16 * 5000
    assert largest_stored(8) < 8 * 5000


@pytest.mark.parametrize("tied_head", [True, False])
def test_padding_of_the_vocabulary_changes_nothing(tied_head: bool) -> None:
    plain, padded = make(tied_head=tied_head), make(tied_head=tied_head, vocab_multiple=64)
    assert padded.token_embedding.num_embeddings == 64
    if padded.head.bias is not None:
        assert plain.head.bias is not None
        with torch.no_grad():
            padded.head.bias[:VOCAB] = plain.head.bias
            padded.head.bias[VOCAB:] = 100.0
    tokens, targets = some_tokens(2, 16), some_tokens(2, 16, seed=1)
    torch.testing.assert_close(padded(tokens), plain(tokens))
    for model in (plain, padded):
        model(tokens, targets).mean().backward()
    gradient = padded.token_embedding.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient[:VOCAB], plain.token_embedding.weight.grad)
    assert (gradient[VOCAB:] == 0).all()


@pytest.mark.parametrize("variant", ["seed", "gpt2", "modern"])
def test_flops_per_token_equal_torchs_count(variant: str) -> None:
    model = make(**{**VARIANTS[variant], "vocab_multiple": 1}).train()
    tokens = some_tokens(2, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).mean().backward()
    assert model.flops_per_token() * tokens.numel() == counter.get_total_flops()


def test_flops_do_not_count_padding() -> None:
    assert make(vocab_multiple=64).flops_per_token() == make().flops_per_token()
