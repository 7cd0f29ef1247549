"""The network. ModelConfig selects its architecture: the small seed model, GPT-2, a modern GPT, or a mix of these.

Shape suffixes:
    B batch      T time (tokens of this call)    S time with the cached tokens before them
    C n_embd     H heads    K key/value heads    D head size    F feed-forward width
    V vocabulary, padded to a multiple of vocab_multiple in the parameters, without padding in logits and losses
    N tokens of a batch, flattened (B*T)

GPT-2: Radford et al. 2019. RoPE: Su et al. 2021, arXiv:2104.09864. RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.
SwiGLU: Shazeer 2020, arXiv:2002.05202. Squared ReLU: So et al. 2021, arXiv:2109.08668. GQA: Ainslie et al. 2023,
arXiv:2305.13245. QK-norm: Henry et al. 2020, arXiv:2010.04245.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

from distgpt.config import ModelConfig
from distgpt.errors import UsageError
from distgpt.model.cpu_attention import attention_in_blocks
from distgpt.model.cpu_linear import Linear
from distgpt.model.document_attention import dense_mask, document_blocks, flex_is_best
from distgpt.model.dropout import DEFAULT_GENERATOR, Dropout, Generators, derived_seed, seeded_generators

INIT_STD = 0.02
LAYERNORM_EPS = 1e-5
RMSNORM_EPS = 1e-6
# Projections that add to the residual stream. Its variance grows with their number (GPT-2, section 2.3).
RESIDUAL_PROJECTIONS = ("attention.output.weight", "mlp.down.weight")


class LayerNorm(nn.LayerNorm):
    """Layer normalization, Ba et al. 2016, arXiv:1607.06450."""

    def forward(self, x: Tensor) -> Tensor:
        # In float32, since autocast or sharding may give the input and the parameters different data types, which no
        # kernel accepts.
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Layer normalization that does not subtract the mean, also computed in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LayerCache:
    """Keys and values of one layer for up to `capacity` tokens, allocated at the first write.

    In float32 on a CPU, where the kernel of torch takes three times as long for one query in bfloat16.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store these keys and values; return all keys and all values so far, (B, K, S, D) each."""
        if self.length == 0:
            B, K, _, D = k_BKTD.shape
            dtype = torch.float32 if k_BKTD.device.type == "cpu" else k_BKTD.dtype
            self.k_BKSD = k_BKTD.new_empty(B, K, self.capacity, D, dtype=dtype)
            self.v_BKSD = v_BKTD.new_empty(B, K, self.capacity, D, dtype=dtype)
        start, self.length = self.length, self.length + k_BKTD.shape[2]
        self.k_BKSD[:, :, start : self.length] = k_BKTD
        self.v_BKSD[:, :, start : self.length] = v_BKTD
        return self.k_BKSD[:, :, : self.length], self.v_BKSD[:, :, : self.length]

    def keep(self, rows_B: Tensor) -> None:
        """Keep these sequences of the batch alone."""
        self.k_BKSD, self.v_BKSD = self.k_BKSD[rows_B], self.v_BKSD[rows_B]


class KVCache:
    """The keys and values of one batch of sequences. Pass it to every forward, together with the new tokens alone.

    Holds at most `capacity` tokens of each sequence, and at most block_size. It is updated in place, so use it under
    torch.no_grad.
    """

    def __init__(self, config: ModelConfig, capacity: int | None = None) -> None:
        capacity = config.block_size if capacity is None else min(capacity, config.block_size)
        self.layers = [LayerCache(capacity) for _ in range(config.n_layer)]
        self.tokens_BS: Tensor | None = None

    @property
    def length(self) -> int:
        """The number of tokens stored per sequence."""
        return self.layers[0].length

    def append_tokens(self, tokens_BT: Tensor) -> Tensor:
        """Store the ids, which the document mask needs; return all ids so far, (B, S)."""
        tokens_BS = tokens_BT if self.tokens_BS is None else torch.cat((self.tokens_BS, tokens_BT), dim=1)
        self.tokens_BS = tokens_BS
        return tokens_BS

    def keep(self, rows_B: Tensor) -> None:
        """Keep these sequences of the batch alone."""
        for layer in self.layers:
            layer.keep(rows_B)
        if self.tokens_BS is not None:
            self.tokens_BS = self.tokens_BS[rows_B]


class Attention(nn.Module):
    """Causal self-attention. Each group of H / K query heads shares one key head and one value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head or config.n_head
        self.head_size = config.size_of_heads
        self.dropout = config.dropout
        rows = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.qkv = Linear(config.n_embd, rows, bias=config.qkv_bias)
        eps = config.norm_eps or RMSNORM_EPS
        self.q_norm = RMSNorm(self.head_size, eps=eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, eps=eps) if config.qk_norm else None
        self.output = Linear(self.n_head * self.head_size, config.n_embd, bias=config.bias)
        self.output_dropout = Dropout(config.dropout)

    def forward(
        self,
        x_BTC: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | BlockMask | None,
        cache: LayerCache | None,
        generators: Generators = DEFAULT_GENERATOR,
    ) -> Tensor:
        """Apply attention and the output projection to (B, T, C).

        `rope`, `mask` and `cache` are those of Block.forward, `generators` those of dropout().
        """
        B, T, _ = x_BTC.shape
        H, K = self.n_head, self.n_kv_head
        qkv = self.qkv(x_BTC).view(B, T, H + 2 * K, self.head_size).transpose(1, 2)
        q_BHTD, k_BKTD, v_BKTD = qkv.split((H, K, K), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTD, k_BKTD = self.q_norm(q_BHTD), self.k_norm(k_BKTD)
        if rope is not None:
            q_BHTD, k_BKTD = rotate(q_BHTD, *rope), rotate(k_BKTD, *rope)
        q_BHTD, k_BKTD = q_BHTD.to(v_BKTD.dtype), k_BKTD.to(v_BKTD.dtype)
        if cache is not None:
            k_BKTD, v_BKTD = cache.append(k_BKTD, v_BKTD)
            q_BHTD = q_BHTD.to(k_BKTD.dtype)
        if isinstance(mask, BlockMask) and not torch.compiler.is_compiling():
            mask = dense_mask(mask)  # FlexAttention would store all scores
        dropout_p = self.dropout if self.training else 0.0
        # SDPA on a CPU is slow with dropout, and slow in bfloat16.
        in_blocks = x_BTC.device.type == "cpu" and cache is None and (dropout_p > 0 or q_BHTD.dtype == torch.bfloat16)
        if K != H and (in_blocks or isinstance(mask, Tensor) or x_BTC.device.type == "mps"):
            # CUDA's kernel for masks has no grouped heads: with enable_gqa, SDPA would store all (T, S) weights. Nor
            # does every version of torch have them on Apple GPUs.
            k_BKTD, v_BKTD = (x.repeat_interleave(H // K, dim=1) for x in (k_BKTD, v_BKTD))
        if isinstance(mask, BlockMask):
            y_BHTD = flex_attention(q_BHTD, k_BKTD, v_BKTD, block_mask=mask, enable_gqa=True)
        elif in_blocks:
            y_BHTD = attention_in_blocks(q_BHTD, k_BKTD, v_BKTD, mask=mask, dropout_p=dropout_p, generators=generators)
        else:
            with torch.autocast(x_BTC.device.type, enabled=False):  # it would convert a float32 cache
                y_BHTD = F.scaled_dot_product_attention(
                    q_BHTD,
                    k_BKTD,
                    v_BKTD,
                    attn_mask=mask,
                    dropout_p=dropout_p,
                    is_causal=mask is None and k_BKTD.shape[2] == T,
                    enable_gqa=k_BKTD.shape[1] != H,
                )
        out: Tensor = self.output_dropout(self.output(y_BHTD.transpose(1, 2).flatten(2)), generators)
        return out


class MLP(nn.Module):
    """The feed-forward network of a block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = mlp_width(config)
        self.kind = config.mlp
        self.up = Linear(config.n_embd, hidden, bias=config.bias)
        self.gate = Linear(config.n_embd, hidden, bias=config.bias) if config.mlp == "swiglu" else None
        self.down = Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BTC: Tensor, generators: Generators = DEFAULT_GENERATOR) -> Tensor:
        """Apply both projections and the activation to (B, T, C). `generators`: those of dropout()."""
        h_BTF = self.up(x_BTC)
        if self.gate is not None:
            h_BTF = F.silu(self.gate(x_BTC)) * h_BTF
        elif self.kind == "gelu":
            h_BTF = F.gelu(h_BTF, approximate="tanh")
        else:
            h_BTF = F.relu(h_BTF)
            h_BTF = h_BTF.square() if self.kind == "relu2" else h_BTF
        out: Tensor = self.dropout(self.down(h_BTF), generators)
        return out


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | BlockMask | None = None,
        cache: LayerCache | None = None,
        dropout_seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Apply the block to (B, T, C).

        `rope`: rope_tables of these tokens. `mask`: True where a query may attend to a key, broadcast to (B, H, T, S),
        or the same as blocks; None: causal. `cache`: the keys and values of this layer for the tokens before these.
        `dropout_seeds`: one for each sequence, of its masks in this layer.
        """
        # Made anew in each call, so that one that computes activations again draws the same masks.
        generators = seeded_generators(dropout_seeds)
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), rope, mask, cache, generators)
        out: Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC), generators)
        return out


class Head(nn.Module):
    """The output projection and the loss. A tied head has no weights: it is given those of the token embedding."""

    def __init__(self, config: ModelConfig, vocab_size: int, padded: int) -> None:
        super().__init__()
        self.vocab_size, self.chunk = vocab_size, config.loss_chunk
        own = not config.tied_head
        # Set by GPT.init_weights or a checkpoint.
        self.weight = nn.Parameter(torch.empty(padded, config.n_embd)) if own else None
        self.bias = nn.Parameter(torch.empty(padded)) if own and config.head_bias else None

    def forward(self, x_BTC: Tensor, targets_BT: Tensor | None, tied_VC: Tensor | None) -> Tensor:
        """Return the logits (B, T, V); with targets, the mean cross-entropy of each sequence in nats, float32, (B,)."""
        weight_VC = self.weight if tied_VC is None else tied_VC
        assert weight_VC is not None
        if targets_BT is None:
            return self._project(x_BTC, weight_VC)
        x_NC, targets_N = x_BTC.flatten(0, 1), targets_BT.flatten()
        if self.chunk == 0:
            return self._token_losses(x_NC, targets_N, weight_VC).view_as(targets_BT).mean(dim=1)
        # The logits are by far the largest activation, V / C times the residual stream. So the logits of each chunk
        # are freed and computed again in the backward pass, at the cost of a second product with the head.
        losses = [
            checkpoint(self._token_losses, x, targets, weight_VC, use_reentrant=False, preserve_rng_state=False)
            for x, targets in zip(torch.split(x_NC, self.chunk), torch.split(targets_N, self.chunk), strict=True)
        ]
        return torch.cat(losses).view_as(targets_BT).mean(dim=1)

    def _project(self, x: Tensor, weight_VC: Tensor) -> Tensor:
        return F.linear(x, weight_VC, self.bias)[..., : self.vocab_size]

    def _token_losses(self, x_NC: Tensor, targets_N: Tensor, weight_VC: Tensor) -> Tensor:
        return F.cross_entropy(self._project(x_NC, weight_VC).float(), targets_N, reduction="none")


class GPT(nn.Module):
    """A decoder-only transformer. Its parameters get their values from init_weights or a checkpoint.

    Works under torch.device("meta"): there are no buffers, so only parameters have to be materialized. The rotary
    tables are computed from the positions in each forward, which costs less than a thousandth of a block.

    Raises UsageError for a document mask without an end-of-text id.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, eot_id: int | None = None) -> None:
        super().__init__()
        if config.document_mask and eot_id is None:
            raise UsageError(
                "model.document_mask is set, but this data is one document without end-of-text tokens: "
                "set --model.document_mask=false"
            )
        self.config = config
        self.vocab_size = vocab_size
        self.eot_id = eot_id
        padded = math.ceil(vocab_size / config.vocab_multiple) * config.vocab_multiple
        self.token_embedding = nn.Embedding(padded, config.n_embd)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if learned else None
        self.embedding_dropout = Dropout(config.dropout if config.embedding_dropout else 0.0)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.blocks_are_compiled = False  # set when they are compiled
        self.norm = make_norm(config)
        self.head = Head(config, vocab_size, padded)

    def initial_value(self, name: str, *, seed: int) -> Tensor:
        """Return the initial value of the parameter `name`: the whole tensor, float32, on the CPU.

        It depends only on the seed, the name and the shape without padding: not on the sharding, on the order of calls,
        or on wrappers around a block, whose names start with an underscore.

        Weights are drawn from N(0, 0.02), biases are 0, norms are 1. With init "scaled", residual projections are drawn
        from N(0, 0.02 / sqrt(2 n_layer)) (GPT-2, section 2.3). Rows that pad the vocabulary are 0 and never read.
        Raises AttributeError if there is no such parameter.
        """
        shape = self.get_parameter(name).shape
        plain = ".".join(part for part in name.split(".") if not part.startswith("_"))
        if plain.endswith(".bias"):
            return torch.zeros(shape, device="cpu")
        if len(shape) == 1:
            return torch.ones(shape, device="cpu")
        digest = hashlib.sha256(f"{seed} {plain}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))
        scaled = self.config.init == "scaled" and plain.endswith(RESIDUAL_PROJECTIONS)
        std = INIT_STD / math.sqrt(2 * self.config.n_layer) if scaled else INIT_STD
        rows = self.vocab_size if plain in ("token_embedding.weight", "head.weight") else shape[0]
        value = torch.zeros(shape, device="cpu")
        value[:rows] = torch.empty(rows, shape[1], device="cpu").normal_(0.0, std, generator=generator)
        return value

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every parameter to its initial_value. The parameters must not be sharded."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial_value(name, seed=seed))

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        dropout_seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V); with targets, the mean cross-entropy of each sequence in nats, float32, (B,).

        `cache` holds the tokens before these. `last_only`: return the logits of the last token alone, (B, 1, V).
        `dropout_seeds`: one for each sequence, which decides its dropout masks on a CPU in eager mode; None: they come
        from the default generator of the device. Raises ValueError if all tokens together exceed block_size.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens_BT.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit in block_size = {self.config.block_size}")
        positions_T = torch.arange(start, end, device=tokens_BT.device)
        x_BTC = self.token_embedding(tokens_BT)
        if self.position_embedding is not None:
            x_BTC = x_BTC + self.position_embedding(positions_T)
        seeds = dropout_seeds if self.config.dropout > 0 else None
        x_BTC = self.embedding_dropout(x_BTC, seeded_generators(seeds))
        rope = rope_tables(positions_T, self.config) if self.config.position == "rope" else None
        mask = self._attention_mask(tokens_BT, positions_T, cache)
        for layer, block in enumerate(self.blocks):
            layer_seeds = None if seeds is None else [derived_seed(seed, layer) for seed in seeds]
            x_BTC = block(x_BTC, rope, mask, None if cache is None else cache.layers[layer], layer_seeds)
        tied_VC = self.token_embedding.weight if self.config.tied_head else None
        x_BTC = self.norm(x_BTC[:, -1:] if last_only else x_BTC)
        losses_or_logits: Tensor = self.head(x_BTC, targets_BT, tied_VC)
        return losses_or_logits

    def flops_per_token(self) -> float:
        """Return the floating-point operations per token of a forward and backward pass over block_size tokens.

        Each of the N weights in matrix products costs a multiplication and an addition forward, and twice that
        backward: 6 N. Attention computes Q K^T and its product with V: each costs 2 T C operations forward per token
        and layer (T keys; here C is H D). That is 4 L C T, and with the backward pass three times as much: 12 L C T
        (PaLM, arXiv:2204.02311, appendix B, which also counts what the causal mask skips). Embeddings are look-ups and
        cost nothing. The head counts, tied or not, without padding.
        """
        c = self.config
        outside = ("token_embedding.weight", "position_embedding.weight", "head.weight")
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and name not in outside)
        head = self.vocab_size * c.n_embd
        return 6.0 * (matrices + head) + 12.0 * c.n_layer * c.n_head * c.size_of_heads * c.block_size

    def _attention_mask(
        self, tokens_BT: Tensor, positions_T: Tensor, cache: KVCache | None
    ) -> Tensor | BlockMask | None:
        """Return True where a query may attend to a key, (T, S) or (B, 1, T, S), or blocks of (B, 1, T, T).

        None if SDPA's causal mode suffices. A document ends with its end-of-text token, which is part of it.
        """
        T = tokens_BT.shape[1]
        start = 0 if cache is None else cache.length

        def causal_TS() -> Tensor:
            return positions_T[:, None] >= torch.arange(start + T, device=tokens_BT.device)

        if not self.config.document_mask:
            return None if start == 0 or T == 1 else causal_TS()
        tokens_BS = tokens_BT if cache is None else cache.append_tokens(tokens_BT)
        assert self.eot_id is not None
        ends_BS = tokens_BS == self.eot_id
        document_BS = ends_BS.cumsum(dim=1) - ends_BS.long()
        if cache is None and self._takes_flex_attention(tokens_BT):
            return document_blocks(document_BS)
        same_BTS = document_BS[:, start:, None] == document_BS[:, None, :]
        return (same_BTS & causal_TS()).unsqueeze(1)

    def _takes_flex_attention(self, tokens_BT: Tensor) -> bool:
        """Tell whether whole sequences take FlexAttention, which has neither dropout nor fast eager code."""
        if not self.blocks_are_compiled or (self.training and self.config.dropout > 0):
            return False
        return flex_is_best(tokens_BT.device, tokens=tokens_BT.shape[1], head_size=self.config.size_of_heads)


@functools.cache
def meta_model(config: ModelConfig, vocab_size: int) -> GPT:
    """Return the network on the meta device: the shapes of its parameters without their values."""
    with torch.device("meta"):
        return GPT(dataclasses.replace(config, document_mask=False), vocab_size)


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters, with the padding of the vocabulary and a tied head once. Allocates nothing."""
    return sum(p.numel() for p in meta_model(config, vocab_size).parameters())


def with_explicit_sizes(config: ModelConfig) -> ModelConfig:
    """Return the config with the values that its zeros stand for, such as n_embd / n_head for head_size."""
    eps = RMSNORM_EPS if config.norm == "rmsnorm" else LAYERNORM_EPS
    return dataclasses.replace(
        config,
        n_kv_head=config.n_kv_head or config.n_head,
        head_size=config.size_of_heads,
        mlp_hidden=mlp_width(config),
        norm_eps=config.norm_eps or eps,
    )


def mlp_width(config: ModelConfig) -> int:
    """Return the feed-forward width. SwiGLU has three matrices: 8/3 C gives as many parameters as 4 C with two."""
    if config.mlp_hidden:
        return config.mlp_hidden
    if config.mlp == "swiglu":
        return math.ceil(config.n_embd * 8 / (3 * 64)) * 64
    return 4 * config.n_embd


def make_norm(config: ModelConfig) -> nn.Module:
    """Build the normalization over C that the config selects."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=config.norm_eps or RMSNORM_EPS)
    return LayerNorm(config.n_embd, eps=config.norm_eps or LAYERNORM_EPS, bias=config.bias)


def rope_tables(positions_T: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, (T, D/2) each, float32, of the rotary angles: position * theta^(-2i/D) for pair i."""
    D = config.size_of_heads
    pair = torch.arange(0, D, 2, dtype=torch.float32, device=positions_T.device)
    angle = positions_T.float()[:, None] * config.rope_theta ** (-pair / D)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of (..., T, D) by its angle. Llama in transformers pairs them in this way."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
