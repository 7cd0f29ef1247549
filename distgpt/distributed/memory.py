"""The memory that training takes on one device, from the shapes of a model: state, weights in use, activations, loss.

Counts what an uncompiled model keeps from its forward to its backward pass, with kernels that fuse norms and attention;
a compiled one keeps less. tests/distributed/test_memory.py holds the figures against counted allocations.
"""

import functools
import math
from dataclasses import astuple, dataclass

from distgpt.config import Config, ModelConfig
from distgpt.model.gpt import meta_model, mlp_width
from distgpt.model.muon import block_matrices

# For each parameter: a gradient summed as an integer (parallel.reduction=exact)
EXACT_SUM_BYTES = 8
# For each parameter with diloco: the shared weights and the momentum of the outer steps
OUTER_BYTES_PER_PARAMETER = 8
# The share of a device's memory that training may take. CUDA, NCCL, cuBLAS and fragmentation need the rest.
USABLE_SHARE = 0.9
# Per token and entry of the vocabulary: the log-probabilities, their gradient and a copy of either, float32.
LOSS_BYTES = 12
# Tensors of the width of an MLP that its activation keeps.
MLP_TENSORS = {"relu": 1, "gelu": 2, "relu2": 2, "swiglu": 4}
# Blocks whose gathered weights or gradients are on a device at once: the current one, and those being exchanged.
BLOCKS_IN_FLIGHT = 3


@dataclass(frozen=True)
class MemoryParts:
    """The memory of one rank in bytes, by what it is for."""

    weights: float
    gradients: float
    optimizer: float  # its moments; with diloco also the shared weights and the momentum
    activations: float
    logits: float  # and the loss
    buffers: float  # weights as products use them, and gradients before they are summed

    @property
    def total(self) -> float:
        """The bytes of all parts."""
        return float(sum(astuple(self)))


@dataclass(frozen=True)
class MemoryModel:
    """The memory of one rank for a model that computes in a data type of `itemsize` bytes."""

    config: Config
    vocab_size: int
    itemsize: int

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole model."""
        return shard_parameters(self.config.model, self.vocab_size, 1)

    @property
    def _exact(self) -> bool:
        return self.config.parallel.reduction == "exact"

    def need(self, sequences: int, *, shards: int, keep_weights: bool = False, whole_gradients: bool = False) -> float:
        """Return the bytes of all parts, see parts()."""
        parts = self.parts(sequences, shards=shards, keep_weights=keep_weights, whole_gradients=whole_gradients)
        return parts.total

    def parts(
        self, sequences: int, *, shards: int, keep_weights: bool = False, whole_gradients: bool = False
    ) -> MemoryParts:
        """Return the memory for micro-batches of `sequences`, on a rank with one of `shards` of the model.

        `keep_weights`: gathered weights are kept for the backward pass; `whole_gradients`: gradients are kept whole,
        in float32 or as integers, until the last micro-batch.
        """
        model = self.config.model
        own = shard_parameters(model, self.vocab_size, shards)
        outer = OUTER_BYTES_PER_PARAMETER if self.config.parallel.strategy == "diloco" else 0
        tokens = sequences * model.block_size
        loss = LOSS_BYTES * self.vocab_size * min(tokens, model.loss_chunk or tokens)
        if model.loss_chunk:  # the gradient of the head stays beside each chunk
            loss += self.itemsize * self.vocab_size * model.n_embd
        layer = tokens * layer_bytes(model, self.itemsize)
        layers = model.n_layer * layer
        if self.config.parallel.activation_checkpoint:
            # The input of each block. One block is whole when the logits are gone already.
            layers = 4 * tokens * model.n_layer * model.n_embd + max(0, layer - loss)
        return MemoryParts(
            weights=4 * own,
            gradients=(4 + EXACT_SUM_BYTES if self._exact else 4) * own,
            optimizer=4 * moments(self.config, self.vocab_size, shards) + outer * own,
            activations=layers + tokens * (4 + self.itemsize) * model.n_embd,
            logits=loss,
            buffers=self._working_weights(shards, keep_weights, whole_gradients),
        )

    def _working_weights(self, shards: int, keep_weights: bool, whole_gradients: bool) -> float:
        """Return the bytes of weights as products use them, and of gradients before they are summed."""
        if shards == 1:  # autocast's copies; in float32 there are none
            return 2 * self.parameters if self.itemsize == 2 else 0
        embeddings = 2 * self.vocab_size * self.config.model.n_embd
        block = (self.parameters - embeddings) / self.config.model.n_layer
        gathered = self.itemsize * (self.parameters if keep_weights else BLOCKS_IN_FLIGHT * block)
        sum_bytes = EXACT_SUM_BYTES if self._exact else 4
        gradients = sum_bytes * (self.parameters if whole_gradients else BLOCKS_IN_FLIGHT * block)
        return max(gathered, 0) + max(gradients, 0) + 4 * embeddings  # those in float32, and their gradients


def state_bytes(config: Config, vocab_size: int) -> int:
    """Return the bytes of all weights, gradients and moments, in float32."""
    return 8 * shard_parameters(config.model, vocab_size, 1) + 4 * moments(config, vocab_size, 1)


def checkpoint_bytes(config: Config, vocab_size: int, replicas: int) -> int:
    """Return the bytes of a checkpoint, weights and moments, of this number of independent replicas."""
    parameters = shard_parameters(config.model, vocab_size, 1)
    shared = OUTER_BYTES_PER_PARAMETER * parameters if replicas > 1 else 0
    return 4 * (parameters + moments(config, vocab_size, 1)) * replicas + shared


def moments(config: Config, vocab_size: int, shards: int) -> int:
    """Return the numbers that the optimizer keeps for the largest shard: two a parameter, one where Muon updates it."""
    by_muon = shard_parameters(config.model, vocab_size, shards, block_matrices_only=True)
    both = 2 * shard_parameters(config.model, vocab_size, shards)
    return both - by_muon if config.optim.name == "muon" else both


@functools.cache
def shard_parameters(config: ModelConfig, vocab_size: int, shards: int, *, block_matrices_only: bool = False) -> int:
    """Return the parameters of the largest shard. FSDP2 cuts each tensor into equal numbers of rows, rounded up."""
    model = meta_model(config, vocab_size)
    shapes = [p.shape for p in (block_matrices(model) if block_matrices_only else model.parameters())]
    return sum(math.ceil(shape[0] / shards) * math.prod(shape[1:]) for shape in shapes)


def layer_bytes(model: ModelConfig, itemsize: int) -> float:
    """Return the bytes per token that one block keeps. `itemsize`: 2 for bfloat16, 4 for float32.

    For GPT-2 in bfloat16, in units of n_embd: the residual stream before both norms 2 x 4, both norms 2 x 2, q, k and v
    6, attention 2, and the MLP before and after its activation 2 x 8: 36.
    """
    width, shared = model.n_embd, (model.n_kv_head or model.n_head) / model.n_head
    values = 2 * width + (1 + 2 * shared) * width + width + MLP_TENSORS[model.mlp] * mlp_width(model)
    if model.qk_norm or model.position == "rope":
        values += (1 + shared) * width  # q and k once more
    if model.document_mask:  # the mask as numbers to add, and keys and values for each head
        values += model.block_size + (2 * width if shared < 1 else 0)
    kept = itemsize * values + 2 * 4 * width
    if model.qk_norm and itemsize == 2:
        kept += 4 * (1 + shared) * width  # q and k in float32
    return kept + (2 * width if model.dropout else 0)  # masks of one byte
