"""Multiple-choice questions, scored by the likelihood that the model gives to each ending.

A file holds JSON lines with "ctx", "endings" and "label", the number of the right ending from 0, as HellaSwag has them
(Zellers et al. 2019, arXiv:1905.07830). Tokens and scores follow EleutherAI's lm-evaluation-harness 0.4. An ending
follows the context after a space (_encode_pair in its lm_eval/api/model.py). acc counts the questions whose right
ending has the highest log-likelihood, acc_norm those where it has the highest per character (process_results in its
lm_eval/api/task.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distgpt.corpus.tokenizer import Tokenizer
from distgpt.distributed.collectives import sum_over_ranks
from distgpt.distributed.parallelize import autocast
from distgpt.distributed.plan import Plan
from distgpt.errors import DataError
from distgpt.model.gpt import GPT
from distgpt.training.evaluation import standard_error


@dataclass(frozen=True)
class Choice:
    """An ending after its context. `ids`: the last block_size + 1 of both; the last `tokens` of them are the ending."""

    ids: list[int]
    tokens: int
    characters: int


@dataclass(frozen=True)
class Question:
    """A context with several endings, of which the one at index `label` is right."""

    choices: list[Choice]
    label: int


@dataclass(frozen=True)
class Scores:
    """The share of questions that are answered right, and its standard error; None for one question."""

    questions: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None


def read_questions(file: Path, tokenizer: Tokenizer, block_size: int) -> list[Question]:
    """Read a file of questions. Raises DataError with the number of the first bad line."""
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line.decode("utf-8-sig")), tokenizer, block_size))
            except DataError as error:
                raise DataError(f"{file}, line {number}: {error}") from None
            except (ValueError, RecursionError):
                raise DataError(f"{file}, line {number}: it is not JSON in UTF-8") from None
    if not questions:
        raise DataError(f"{file} has no question: each line is an object with ctx, endings and label")
    return questions


def _question(values: Any, tokenizer: Tokenizer, block_size: int) -> Question:
    """Encode a line of the file. Raises DataError, or ValueError for text that is not UTF-8."""
    if not isinstance(values, dict):
        raise DataError("it is not an object with ctx, endings and label")
    context, endings, label = (values.get(key) for key in ("ctx", "endings", "label"))
    if not isinstance(context, str):
        raise DataError('its "ctx" is not a text')
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(end, str) and end for end in endings):
        raise DataError('its "endings" are not a list of two texts or more')
    if isinstance(label, str) and label.isdecimal():  # as in Hugging Face's copy of HellaSwag
        label = int(label)
    if type(label) is not int or not 0 <= label < len(endings):
        raise DataError(f'its "label" is not the number of an ending, from 0 to {len(endings) - 1}')
    return Question([_choice(context, ending, tokenizer, block_size) for ending in endings], label)


def _choice(context: str, ending: str, tokenizer: Tokenizer, block_size: int) -> Choice:
    # Spaces at the end of the context belong to the ending, since words begin with them in most vocabularies.
    before = context.rstrip()
    ids = tokenizer.encode(f"{context} {ending}").tolist()
    tokens = len(ids) - len(tokenizer.encode(before))
    if not 0 < tokens <= block_size:
        raise DataError(f"the ending {ending[:40]!r} takes {tokens} tokens: the model reads 1 to {block_size}")
    if not before:
        ids = [tokenizer.eot_id or 0, *ids]
    return Choice(ids[-block_size - 1 :], tokens, len(ending))


def score(model: GPT, questions: Sequence[Question], plan: Plan) -> Scores:
    """Score a model that every rank holds whole. The batches, and so the result, are equal for any number of ranks."""
    runtime = plan.runtime
    choices = [choice for question in questions for choice in question.choices]
    # Sorted by length, so that a batch has little padding.
    order = sorted(range(len(choices)), key=lambda i: len(choices[i].ids), reverse=True)
    batches = [order[start : start + plan.micro_batch] for start in range(0, len(order), plan.micro_batch)]
    found_N = torch.zeros(len(choices), dtype=torch.float64, device=runtime.float64_device)
    with torch.no_grad(), autocast(runtime.device, plan.dtype):
        for batch in batches[runtime.rank :: runtime.world_size]:
            found_N[batch] = log_likelihoods(model, [choices[i] for i in batch], runtime.device)
    left = sum_over_ranks(found_N, runtime).cpu()
    right, right_norm = [], []
    for question in questions:
        found, left = left[: len(question.choices)], left[len(question.choices) :]
        characters = torch.tensor([choice.characters for choice in question.choices])
        right.append(float(int(found.argmax()) == question.label))
        right_norm.append(float(int((found / characters).argmax()) == question.label))
    acc, acc_norm = (torch.tensor(values, dtype=torch.float64) for values in (right, right_norm))
    return Scores(
        len(questions), acc.mean().item(), standard_error(acc), acc_norm.mean().item(), standard_error(acc_norm)
    )


def log_likelihoods(model: GPT, choices: Sequence[Choice], device: torch.device) -> torch.Tensor:
    """Return the log-likelihood of each ending after its context, in nats: (B,), float64."""
    lengths = [len(choice.ids) for choice in choices]
    # Padding comes after a sequence, so none of its tokens attends to it.
    ids_BT = torch.tensor([[*choice.ids, *[0] * (max(lengths) - len(choice.ids))] for choice in choices], device=device)
    logits_BVT = model(ids_BT[:, :-1]).float().transpose(1, 2)
    log_p_BT = -F.cross_entropy(logits_BVT, ids_BT[:, 1:], reduction="none").double()
    ends = [(length - 1 - choice.tokens, length - 1) for length, choice in zip(lengths, choices, strict=True)]
    return torch.stack([log_p_T[start:end].sum() for log_p_T, (start, end) in zip(log_p_BT, ends, strict=True)])
