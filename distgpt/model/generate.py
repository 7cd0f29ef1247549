"""Sampling of new tokens from a model, one at a time, with a KV cache.

It calls GPT.forward alone, so it also works with a sharded model: every rank then calls it with the same arguments and
a generator with the same seed, and all ranks draw the same tokens.
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
    """Continue a prompt: yield each new id as it is drawn, at most `max_tokens` of them.

    `temperature` 0 takes the most likely id. `top_k` keeps the k most likely ids (0: all). Of these `top_p` keeps the
    smallest set of the most likely ids that reaches this probability (1: all; nucleus sampling, Holtzman et al. 2019,
    arXiv:1904.09751). An empty prompt starts from the end-of-text id, or from id 0 if the vocabulary has none.
    `stop_at_eot`: stop after the end-of-text id.

    The context holds the last block_size ids at most. When it is full, its last half becomes a new prompt at position
    0: one recomputation then serves block_size / 2 tokens, with learned and rotary positions alike.

    Ids are drawn on the generator's device; a CPU generator draws the same ids whatever the model's device. The model
    is in eval mode until this generator is exhausted or closed, then in its former mode. A compiled model would
    recompile for each length of the cache: consume the ids inside `torch.compiler.set_stance("force_eager")`.
    Raises ValueError for an argument out of range.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens is {max_tokens}: it must be at least 0")
    if not temperature >= 0 or top_k < 0 or not 0 < top_p <= 1:
        needed = "temperature and top_k must be at least 0, top_p above 0 and at most 1"
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: {needed}")
    unknown = [i for i in prompt_ids if not 0 <= i < model.vocab_size]
    if unknown:
        raise ValueError(f"the prompt holds id {unknown[0]}, outside the vocabulary of {model.vocab_size}")
    prompt = list(prompt_ids) or [model.eot_id or 0]
    eot_id = model.eot_id if stop_at_eot else None
    return _generate(model, torch.tensor([prompt]), max_tokens, temperature, top_k, top_p, generator, eot_id)


# Not inference_mode: FSDP2 keeps the parameters that it gathers here for later training steps, which would then fail
# with "Inference tensors do not track version counter". As a decorator, no_grad does not apply to the caller's code
# between two ids.
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
    """Draw one id for each row of the logits: (B,), int64."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV, ids_BV = logits_BV.float().sort(dim=-1, descending=True, stable=True)
    if top_k:
        logits_BV = logits_BV[:, :top_k]
    # Relative to the largest logit, so that a tiny temperature gives 0 for it and not infinity.
    p_BV = torch.softmax((logits_BV - logits_BV[:, :1]) / temperature, dim=-1)
    # Keep an id if those before it have less than top_p in total. This always keeps the first id, and the one that
    # crosses top_p.
    p_BV = p_BV.masked_fill(p_BV.cumsum(dim=-1) - p_BV >= top_p, 0.0)
    rank_B1 = torch.multinomial(p_BV, 1, generator=generator)
    return ids_BV.gather(1, rank_B1).squeeze(1)
