"""Sampling: new tokens from a model, one at a time, with a KV cache.

Calls GPT.forward and nothing else, so that it works on a sharded model too, where every rank calls it with the same
arguments and an equally seeded generator, and all draw the same tokens.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from distgpt.model.gpt import GPT, KVCache


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator,
    stop_at_eot: bool = False,
) -> Generator[int, None, None]:
    """Continue a prompt: yields the next ids as they are drawn, at most `max_tokens`.

    `temperature` 0 is greedy. `top_k` keeps the k likeliest ids (0: all), then `top_p` the smallest set of the
    likeliest that reaches this probability (1: all; nucleus sampling, Holtzman et al. 2019, arXiv:1904.09751).
    An empty prompt starts from the end-of-text id, or from id 0 where the vocabulary has none.
    With `stop_at_eot` the end-of-text id is the last.

    Context: at most the last block_size ids. When these are full, the last half of them becomes a new prompt at
    position 0, so that one recomputation serves block_size / 2 tokens, with learned and rotary positions alike.

    Draws on the generator's device (a CPU generator gives the same stream for every device), in eval mode, which it
    undoes when it is exhausted or closed. A compiled model recompiles for the growing cache: take the tokens inside
    `torch.compiler.set_stance("force_eager")`. Raises ValueError for arguments that cannot work.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}: at least 0")
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: at least 0, at least 0, 0 < p <= 1")
    wrong = [i for i in prompt_ids if not 0 <= i < model.vocab_size]
    if wrong:
        raise ValueError(f"the prompt holds id {wrong[0]}, outside the vocabulary of {model.vocab_size}")
    prompt = list(prompt_ids) or [model.eot_id or 0]
    eot_id = model.eot_id if stop_at_eot else None
    return _generate(model, torch.tensor([prompt]), max_tokens, temperature, top_k, top_p, generator, eot_id)


# no_grad and not inference_mode: FSDP2 keeps what it gathers in here for the training steps that follow, which then
# fail with "Inference tensors do not track version counter". As a decorator it does not leak into the consumer.
@torch.no_grad()
def _generate(
    model: GPT,
    context_1S: Tensor,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    eot_id: int | None,
) -> Generator[int, None, None]:
    device = next(model.parameters()).device
    block_size = model.config.block_size
    training = model.training
    model.eval()
    try:
        context_1S = context_1S[:, -block_size:]
        cache, new_1T = KVCache(model.config), context_1S
        for _ in range(max_tokens):
            logits_1V = model(new_1T.to(device), cache=cache)[:, -1]
            id_1 = draw(logits_1V.to(generator.device), temperature, top_k, top_p, generator).cpu()
            token = int(id_1)
            yield token
            if token == eot_id:
                return
            new_1T = id_1[:, None]
            context_1S = torch.cat((context_1S, new_1T), dim=1)
            if cache.length == block_size:
                context_1S = context_1S[:, -max(1, block_size // 2) :]
                cache, new_1T = KVCache(model.config), context_1S
    finally:
        model.train(training)


def draw(logits_BV: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One id per row of the logits, (B,), int64."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV, ids_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    if top_k:
        logits_BV = logits_BV[:, :top_k]
    # From the likeliest downwards: what is divided by a tiny temperature is 0 there and not infinite.
    p_BV = torch.softmax((logits_BV - logits_BV[:, :1]) / temperature, dim=-1)
    # What comes before an id in this order: the first is always kept, and the one that crosses top_p too.
    p_BV = p_BV.masked_fill(p_BV.cumsum(dim=-1) - p_BV >= top_p, 0.0)
    rank_B1 = torch.multinomial(p_BV, 1, generator=generator)
    return ids_BV.gather(1, rank_B1).squeeze(1)
