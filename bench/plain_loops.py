"""The loops that bench/training.py compares with, written anew: the ancestor's, and one like nanoGPT's.

The ancestor is the tutorial from which the preset `seed` comes: a module for each attention head, and AdamW alone.
nanoGPT has one projection for all heads, F.scaled_dot_product_attention, a tied head, no biases, and clips gradients.
Both compute in float32, as they do on a CPU, with torch.optim.AdamW as it is by default.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Takes an optimizer step on a batch that is always the same, and returns its loss.
Step = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """The model and batch of the speed part; the defaults are those of the preset `seed`."""

    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256
    batch: int = 64
    dropout: float = 0.2
    vocabulary: int = 65


class AncestorAttention(nn.Module):
    """Attention with three projections for each head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        C, D, T = shape.n_embd, shape.n_embd // shape.n_head, shape.block_size
        heads = range(shape.n_head)
        self.query, self.key, self.value = (nn.ModuleList(nn.Linear(C, D, bias=False) for _ in heads) for _ in range(3))
        self.future: Tensor
        self.register_buffer("future", torch.ones(T, T).triu(1).bool())
        self.weight_dropout, self.output_dropout = nn.Dropout(shape.dropout), nn.Dropout(shape.dropout)
        self.output = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        T, heads = x.shape[1], []
        for query, key, value in zip(self.query, self.key, self.value, strict=True):
            q, k, v = query(x), key(x), value(x)
            scores = (q @ k.mT * k.shape[-1] ** -0.5).masked_fill(self.future[:T, :T], -torch.inf)
            heads.append(self.weight_dropout(F.softmax(scores, dim=-1)) @ v)
        out: Tensor = self.output_dropout(self.output(torch.cat(heads, dim=-1)))
        return out


class FusedAttention(nn.Module):
    """Attention with one projection for all heads, and torch's kernel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head, self.dropout = shape.n_head, shape.dropout
        self.qkv = nn.Linear(shape.n_embd, 3 * shape.n_embd, bias=False)
        self.output = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.output_dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        out: Tensor = self.output_dropout(self.output(y.transpose(1, 2).reshape(B, T, C)))
        return out


class PlainGPT(nn.Module):
    """The model of a plain loop, the ancestor's or one like nanoGPT's."""

    def __init__(self, shape: Shape, *, ancestor: bool) -> None:
        super().__init__()
        C = shape.n_embd
        self.tokens, self.positions = nn.Embedding(shape.vocabulary, C), nn.Embedding(shape.block_size, C)
        self.embedding_dropout = nn.Dropout(0.0 if ancestor else shape.dropout)
        self.branches = nn.ModuleList()
        for _ in range(shape.n_layer):
            attention = AncestorAttention(shape) if ancestor else FusedAttention(shape)
            activation = nn.ReLU() if ancestor else nn.GELU()
            up, down = nn.Linear(C, 4 * C, bias=ancestor), nn.Linear(4 * C, C, bias=ancestor)
            for branch in (attention, nn.Sequential(up, activation, down, nn.Dropout(shape.dropout))):
                self.branches.append(nn.Sequential(nn.LayerNorm(C, bias=ancestor), branch))
        self.norm = nn.LayerNorm(C, bias=ancestor)
        self.head = nn.Linear(C, shape.vocabulary, bias=ancestor)
        if not ancestor:
            self.head.weight = self.tokens.weight

    def forward(self, x_BT: Tensor, y_BT: Tensor) -> Tensor:
        x = self.embedding_dropout(self.tokens(x_BT) + self.positions(torch.arange(x_BT.shape[1])))
        for branch in self.branches:
            x = x + branch(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), y_BT.flatten())


def random_batch(shape: Shape) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.block_size + 1))
    return tokens[:, :-1], tokens[:, 1:]


def plain_step(shape: Shape, *, ancestor: bool) -> Step:
    """Return the step of a plain loop."""
    model = PlainGPT(shape, ancestor=ancestor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    x_BT, y_BT = random_batch(shape)

    def step() -> float:
        loss = model(x_BT, y_BT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not ancestor:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.item())

    return step
