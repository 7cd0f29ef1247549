"""Questions are read line by line, and scored by the likelihood of their endings as lm-evaluation-harness does."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distgpt.config import resolve
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.corpus.tokenizer.simple import ByteTokenizer
from distgpt.distributed.plan import Plan, make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError
from distgpt.model.gpt import GPT
from distgpt.training import multiple_choice
from distgpt.training.multiple_choice import read_questions, score
from tests import jobs

SMALL = ("--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=24", "--train.micro_batch=4")
EXAMPLE = jobs.PROJECT / "docs" / "ten-questions.jsonl"
CONTEXTS = ("the sea ", "", "a context of more characters than the model reads")
ENDINGS = ("is", "was blue", "sings\nlow")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return ByteTokenizer(end_of_text=False)


@pytest.fixture
def plan(one_process: Runtime) -> Plan:
    return make_plan(resolve([*SMALL, "--train.dtype=float32"], {}), one_process, vocab_size=256)


@pytest.fixture
def model() -> GPT:
    model = GPT(resolve(SMALL, {}).model, 256)
    model.init_weights(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0)  # so that endings differ clearly
    return model.eval()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Write the lines of a task, each an object or raw bytes."""

    def write(*lines: Any) -> Path:
        file = tmp_path / "task.jsonl"
        file.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return file

    return write


def log_likelihood(model: GPT, context: str, ending: str) -> float:
    """Compute it alone, by another way: no batch, no padding."""
    ids = torch.tensor([[*(context.encode() or b"\0"), *f" {ending}".encode()]])[:, -25:]
    with torch.no_grad():
        log_p_TV = model(ids[:, :-1])[0].double().log_softmax(-1)
    spaces = len(context) - len(context.rstrip())
    return float(log_p_TV.gather(1, ids[0, 1:, None])[-len(ending) - 1 - spaces :].sum())


def test_scores_are_those_of_the_likelihoods(
    model: GPT, tokenizer: Tokenizer, plan: Plan, write: Callable[..., Path]
) -> None:
    """Half of the labels are the likeliest endings. They differ from those that are the likeliest per character."""
    found = [[log_likelihood(model, context, ending) for ending in ENDINGS] for context in CONTEXTS]
    best = [max(range(3), key=of.__getitem__) for of in found]
    best_norm = [max(range(3), key=lambda i, of=of: of[i] / len(ENDINGS[i])) for of in found]  # type: ignore[misc]
    assert best != best_norm
    labels = [*best, *((label + 1) % 3 for label in best)]
    lines = [{"ctx": c, "endings": ENDINGS, "label": n} for c, n in zip(CONTEXTS * 2, labels, strict=True)]
    scores = score(model, read_questions(write(*lines), tokenizer, 24), plan)
    assert (scores.questions, scores.acc) == (6, 0.5)
    assert scores.acc_norm == sum(a == b for a, b in zip(labels, best_norm * 2, strict=True)) / 6
    assert scores.acc_stderr == pytest.approx((0.25 * 6 / 5 / 6) ** 0.5)


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_parts_of_several_ranks_add_up_bit_for_bit(
    model: GPT,
    tokenizer: Tokenizer,
    plan: Plan,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
) -> None:
    lines = [{"ctx": context, "endings": ENDINGS, "label": 0} for context in CONTEXTS]
    questions, parts = read_questions(write(*lines), tokenizer, 24), []

    def keep(values: torch.Tensor, runtime: Runtime) -> torch.Tensor:
        parts.append(values)
        return values

    monkeypatch.setattr(multiple_choice, "sum_over_ranks", keep)
    for rank, size in ((0, 1), *((rank, ranks) for rank in range(ranks))):
        score(model, questions, replace(plan, runtime=replace(plan.runtime, rank=rank, world_size=size)))
    assert torch.equal(torch.stack(parts[1:]).sum(dim=0), parts[0])
    assert (parts[0] < 0).all()
    assert torch.stack(parts[1:]).count_nonzero() == len(parts[0])


def test_the_example_has_ten_questions(tokenizer: Tokenizer) -> None:
    questions = read_questions(EXAMPLE, tokenizer, 256)
    assert [question.label for question in questions] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert {len(question.choices) for question in questions} == {4}


GOOD = {"ctx": "a", "endings": ["b", "c"], "label": 1, "ind": 4}


def test_labels_may_be_texts_and_lines_may_be_empty(tokenizer: Tokenizer, write: Callable[..., Path]) -> None:
    file = write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b" ", GOOD | {"label": "0"})
    assert [question.label for question in read_questions(file, tokenizer, 8)] == [1, 0]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "it is not JSON in UTF-8"),
        (b'{"ctx": "\xe9"}', "it is not JSON in UTF-8"),
        ([], "it is not an object with ctx, endings and label"),
        (GOOD | {"ctx": None}, 'its "ctx" is not a text'),
        (GOOD | {"endings": ["b"]}, 'its "endings" are not a list of two texts or more'),
        (GOOD | {"endings": ["b", ""]}, 'its "endings" are not a list of two texts or more'),
        (GOOD | {"label": 2}, 'its "label" is not the number of an ending, from 0 to 1'),
        (GOOD | {"label": ""}, 'its "label" is not the number of an ending, from 0 to 1'),
        (GOOD | {"label": True}, 'its "label" is not the number of an ending, from 0 to 1'),
        (GOOD | {"endings": ["b", "12345678"]}, "the ending '12345678' takes 9 tokens: the model reads 1 to 8"),
    ],
)
def test_a_bad_line_is_named(tokenizer: Tokenizer, write: Callable[..., Path], line: Any, problem: str) -> None:
    file = write(GOOD, line)
    with pytest.raises(DataError, match=re.escape(f"{file}, line 2: {problem}")):
        read_questions(file, tokenizer, 8)


def test_a_file_without_questions_is_refused(tokenizer: Tokenizer, write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no question: "):
        read_questions(write(), tokenizer, 8)
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        read_questions(tmp_path / "none", tokenizer, 8)
