"""Sampling of new tokens from a model, for several texts at once, with a KV cache.

It calls GPT.forward alone, so it also works with a sharded model: every rank then calls it with the same arguments and
generators with the same seeds, and all ranks draw the same tokens.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distgpt.model.gpt import GPT, KVCache

# On a CPU, top_p sorts only this many of the most likely ids if they suffice: sorting all 50,257 takes longer than a
# forward pass of a small model.
NUCLEUS_CANDIDATES = 1024
# A stronger penalty, or one weaker than its inverse, is limited to this, so that logits stay finite.
MAX_PENALTY = 1e30
# Without cuDNN, which plans anew for each length of the cache.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing ids, by the definitions of Hugging Face's transformers.

    Raises ValueError for a value out of range.

    In this order: `repetition_penalty` divides the positive logits of ids that the text has so far, prompt included,
    and multiplies the negative ones (1: none; CTRL, Keskar et al. 2019, arXiv:1909.05858). `temperature` divides all
    (0: take the most likely id). `top_k` keeps the k most likely ids (0: all). Of these `top_p` keeps the smallest set
    of the most likely ids that reaches this probability (1: all; nucleus sampling, Holtzman et al. 2019,
    arXiv:1904.09751). `min_p` drops ids less likely than this share of the most likely one (0: none; Nguyen et al.
    2024, arXiv:2407.01082). Ids that are as likely as the last one kept are kept too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        needed = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "at least 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (holds, condition) in needed.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be {condition}")


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    ended: Callable[[int], bool] = lambda row: False,
) -> Generator[tuple[int, int], None, None]:
    """Continue several prompts as one batch: yield each new id as (row, id), where `row` is the index of its prompt.

    Each text gets `max_tokens` new ids, or fewer: no more follow once `ended(row)` is true. A text draws one number for
    each id from its own generator, on the CPU. So it does not depend on the other texts of its batch, nor on the
    device, except by the rounding of matrix products, which depends on the size of the batch.

    Prompts of several lengths need no padding: the batch starts with as many ids as the shortest prompt has, and the
    other texts read an id of their prompt in the steps in which the first ones draw. Prompts of one length are the
    fastest. An empty prompt starts from the end-of-text id, or from id 0 if the vocabulary has none.

    The context holds the last block_size ids at most. When it is full, its last half becomes a new prompt at position
    0: one recomputation then serves block_size / 2 tokens, with learned and rotary positions alike.

    The model is in eval mode until this generator is exhausted or closed, then in its former mode. A compiled model
    would recompile for each length of the cache: consume the ids inside `torch.compiler.set_stance("force_eager")`.
    Raises ValueError for an argument out of range.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}: it must be at least 0")
    if not prompts or len(prompts) != len(generators):
        raise ValueError(f"{len(prompts)} prompts and {len(generators)} generators: each prompt needs one of its own")
    unknown = [i for prompt in prompts for i in prompt if not 0 <= i < model.vocab_size]
    if unknown:
        raise ValueError(f"the prompt holds id {unknown[0]}, outside the vocabulary of {model.vocab_size}")
    texts = [list(prompt) or [model.eot_id or 0] for prompt in prompts]
    return _generate(model, texts, max_tokens, sampling, generators, ended)


# Not inference_mode: FSDP2 keeps the parameters that it gathers here for later training steps, which would then fail
# with "Inference tensors do not track version counter". As a decorator, no_grad does not apply to the caller's code
# between two ids.
@torch.no_grad()
def _generate(
    model: GPT,
    texts: list[list[int]],
    max_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    ended: Callable[[int], bool],
) -> Generator[tuple[int, int], None, None]:
    device, block_size = next(model.parameters()).device, model.config.block_size
    training = model.training
    model.eval()
    try:
        seen_BV = _seen(texts, model.vocab_size).to(device) if sampling.repetition_penalty != 1 else None
        texts = [text[-block_size:] for text in texts]
        lengths = [len(text) + max_tokens for text in texts]
        rows = list(range(len(texts))) if max_tokens else []
        cache, position = KVCache(model.config, max(lengths)), min(map(len, texts))  # ids of each text that were read
        new_BT = torch.tensor([text[:position] for text in texts])
        while rows:
            with _kernels(new_BT, device):
                logits_BV = model(new_BT.to(device), cache=cache, last_only=True)[:, -1]
            drawing = [len(texts[row]) == position for row in rows]
            numbers = [_uniform(generators[row]) if draws else 0.0 for row, draws in zip(rows, drawing, strict=True)]
            drawn = draw(logits_BV, numbers, sampling, seen_BV).tolist()
            for row, draws, token in zip(rows, drawing, drawn, strict=True):
                if draws:
                    texts[row].append(token)
                    yield row, token
            unfinished = [i for i, row in enumerate(rows) if len(texts[row]) < lengths[row] and not ended(row)]
            if not unfinished:
                return
            if len(unfinished) < len(rows):
                rows = [rows[i] for i in unfinished]
                kept_B = torch.tensor(unfinished, device=device)
                cache.keep(kept_B)
                seen_BV = None if seen_BV is None else seen_BV[kept_B]
            first, position = position, position + 1
            if cache.length == block_size:
                cache, first = KVCache(model.config), position - max(1, block_size // 2)
            new_BT = torch.tensor([texts[row][first:position] for row in rows])
            if seen_BV is not None:
                seen_BV.scatter_(1, new_BT.to(device), True)
    finally:
        model.train(training)


@contextmanager
def _kernels(new_BT: Tensor, device: torch.device) -> Iterator[None]:
    """Choose the kernels for these new tokens."""
    # MKL reads bfloat16 weights twice as fast as oneDNN for a single token, and slower for several.
    use_mkldnn = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = use_mkldnn and (  # type: ignore[assignment]
        device.type != "cpu" or new_BT.numel() > 1
    )
    try:
        with sdpa_kernel(ATTENTION):
            yield
    finally:
        torch.backends.mkldnn.enabled = use_mkldnn


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def _seen(texts: Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Return which ids each text has, bool, (B, V)."""
    seen_BV = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen_BV[row, torch.tensor(text)] = True
    return seen_BV


def draw(logits_BV: Tensor, uniform_B: Sequence[float], sampling: Sampling, seen_BV: Tensor | None = None) -> Tensor:
    """Draw one id for each row of the logits: (B,), int64.

    `uniform_B`: a number from [0, 1) for each row, which alone decides the id. `seen_BV`: the ids that are penalized.
    """
    logits_BV = logits_BV.float()
    if seen_BV is not None:
        penalty = min(max(sampling.repetition_penalty, 1 / MAX_PENALTY), MAX_PENALTY)
        penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = torch.where(seen_BV, penalized_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    # Relative to the largest logit, which a tiny temperature would otherwise make infinite. A temperature below this
    # one would be 0 in float32.
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    p_BV = torch.softmax((logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if 0 < sampling.top_k < p_BV.shape[1]:
        least_B1 = p_BV.topk(sampling.top_k).values[:, -1:]
        p_BV = p_BV.masked_fill(p_BV < least_B1, 0.0)
        p_BV = p_BV / p_BV.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        p_BV = p_BV.masked_fill(p_BV < _least_in_nucleus(p_BV, sampling), 0.0)
    if sampling.min_p:
        p_BV = p_BV.masked_fill(p_BV < sampling.min_p * p_BV.amax(dim=-1, keepdim=True), 0.0)
    if p_BV.device.type == "mps":
        p_BV = p_BV.cpu()  # an Apple GPU has no float64
    # The id at which the cumulative probability exceeds the uniform number.
    cumulative_BV = p_BV.cumsum(dim=-1, dtype=torch.float64)
    uniform_B1 = torch.tensor(uniform_B, dtype=torch.float64, device=p_BV.device)[:, None]
    return torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True).squeeze(1)


def _least_in_nucleus(p_BV: Tensor, sampling: Sampling) -> Tensor:
    """Return the least probability that top_p keeps: (B, 1)."""
    part = sampling.top_k or NUCLEUS_CANDIDATES
    descending_BV = p_BV.topk(part).values if p_BV.device.type == "cpu" and part < p_BV.shape[1] else None
    if descending_BV is None or descending_BV.sum(dim=-1).min() < sampling.top_p:
        descending_BV = p_BV.sort(dim=-1, descending=True).values
    # Keep an id if those before it have less than top_p in total. This always keeps the first id, and the one that
    # crosses top_p.
    dropped_BV = descending_BV.cumsum(dim=-1) - descending_BV >= sampling.top_p
    return descending_BV.masked_fill(dropped_BV, 1.0).amin(dim=-1, keepdim=True)
