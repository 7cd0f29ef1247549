"""The same steps in every topology: the same losses and gradient norms. docs/equivalence.md has what was found."""

import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from distgpt.corpus.shard_writer import Documents, write_dataset
from distgpt.corpus.tokenizer.simple import CharTokenizer
from distgpt.units import ranks_text
from tests import jobs
from tests.end_to_end import equivalence
from tests.end_to_end.equivalence import (
    ALL,
    CORNERS,
    DTYPES,
    MOST_RANKS,
    OPTIMIZERS,
    Cell,
    Curve,
    to_json,
    with_references,
)

PAGE = jobs.PROJECT / "docs" / "equivalence.md"
# How far a loss and a gradient norm may be from those of one process, relative to them.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (1e-4, 1e-2)}
# With --storms, and otherwise.
STEPS, FEWER_STEPS = 20, 10
BEGIN, END = "<!-- begin deviations: made by test_equivalence.py -->\n", "<!-- end deviations -->"

Deviation = tuple[float, float]


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of short documents with 64 characters and the end-of-text token: a vocabulary of 65."""
    tokenizer = CharTokenizer(map(chr, range(32, 96)), end_of_text=True)
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.geometric(0.1, 20_000) - 1, 63).astype(np.uint16)
    tokens[draw.random(len(tokens)) < 1 / 8] = tokens[-1] = 64
    ends = np.flatnonzero(tokens == 64) + 1
    directory = tmp_path_factory.mktemp("documents")
    write_dataset(
        directory,
        [Documents(split, tokens, ends) for split in ("train", "val")],
        tokenizer=tokenizer,
        eot_id=64,
        shard_tokens=None,
        about={},
        advance=lambda written: None,
    )
    return directory


def trained(cells: Sequence[Cell], steps: int, data: Path, directory: Path) -> dict[Cell, Curve]:
    """Train the cells, one after the other, in as many processes as the largest has ranks."""
    (directory / "cells.json").write_text(to_json(cells))
    arguments = [str(data), str(steps), str(directory / "cells.json"), str(directory)]
    command = [sys.executable, "-m", equivalence.__name__, *arguments]
    with tempfile.TemporaryFile("w+") as output:
        number = output.fileno()
        ranks = [
            jobs.start(command, stdout=number, stderr=number, variables={"RANK": str(rank)})
            for rank in range(MOST_RANKS)
        ]
        codes = [rank.wait() for rank in ranks]
        output.seek(0)
        assert codes == [0] * MOST_RANKS, output.read()
    curves = [json.loads((directory / f"{number}.json").read_text()) for number in range(len(cells))]
    assert {len(curve) for curve in curves} == {steps}
    return dict(zip(cells, curves, strict=True))


@pytest.fixture(scope="module")
def curves(
    request: pytest.FixtureRequest, documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Cell, Curve]:
    """The corners of the matrix or, with --storms, all of it."""
    cells, steps = (ALL, STEPS) if request.config.getoption("--storms") else (CORNERS, FEWER_STEPS)
    return trained(with_references(cells), steps, documents, tmp_path_factory.mktemp("equivalence"))


def deviations(curve: Curve, reference: Curve) -> Deviation:
    """Return the largest relative deviation of the losses, and that of the gradient norms."""
    loss, norm = np.abs(np.array(curve) / np.array(reference) - 1).max(axis=0)
    return float(loss), float(norm)


def table(found: Mapping[Cell, Deviation]) -> str:
    """Return the table of the page: the largest deviations of losses and of gradient norms in each group of cells."""
    columns = list(itertools.product(DTYPES, OPTIMIZERS))
    lines = [
        f"| | {' | '.join(f'{dtype}, {optimizer}' for dtype, optimizer in columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    for ranks, strategy in sorted({(cell.ranks, cell.strategy) for cell in found}):
        texts = []
        for column in columns:
            far = [
                far
                for cell, far in found.items()
                if (cell.ranks, cell.strategy, cell.dtype, cell.optimizer) == (ranks, strategy, *column)
            ]
            texts.append(" / ".join(f"{max(values):.1e}" for values in zip(*far, strict=True)))
        lines.append(f"| {strategy}, {ranks_text(ranks)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def page_with(table: str) -> str:
    """Return the page with another table."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def without_figures(text: str) -> str:
    return re.sub(r"\d\.\de[+-]\d\d", "?", text)


def test_the_corners_have_every_value_and_each_strategy_with_every_way_to_compute() -> None:
    def values(cells: Iterable[Cell]) -> set[tuple[str, object]]:
        return {pair for cell in cells for pair in asdict(cell).items()}

    def ways(cells: Iterable[Cell]) -> set[tuple[str, str, object]]:
        axes = ("recompute", "dtype", "optimizer")
        return {(cell.strategy, axis, getattr(cell, axis)) for cell in cells for axis in axes}

    assert set(CORNERS) < set(ALL)
    assert values(CORNERS) == values(ALL)
    assert ways(CORNERS) == ways(ALL)


@pytest.mark.storm
@pytest.mark.timeout(3600)
def test_losses_and_gradient_norms_do_not_depend_on_the_topology(
    curves: dict[Cell, Curve], request: pytest.FixtureRequest
) -> None:
    """With --storms, the table in docs/ is written anew; otherwise it must be that of these cells."""
    found = {cell: deviations(curve, curves[cell.reference()]) for cell, curve in curves.items()}
    for cell, (loss, norm) in found.items():
        most = TOLERANCE[cell.dtype]
        assert loss <= most[0], cell
        assert norm <= most[1], cell
    if request.config.getoption("--storms"):
        PAGE.write_text(page_with(table(found)), encoding="utf-8")
    zeros = table(dict.fromkeys(ALL, (0.0, 0.0)))
    assert without_figures(PAGE.read_text(encoding="utf-8")) == without_figures(page_with(zeros))


def test_recomputed_activations_change_no_bit(curves: dict[Cell, Curve]) -> None:
    pairs = [(cell, replace(cell, recompute=False)) for cell in curves if cell.recompute]
    compared = [cell for cell, other in pairs if other in curves]
    assert compared
    assert [cell for cell in compared if curves[cell] != curves[replace(cell, recompute=False)]] == []


def test_what_changes_the_result_shows(curves: dict[Cell, Curve]) -> None:
    one, other = (curves[Cell(1, "single", 1, False, "float32", optimizer)] for optimizer in ("adamw", "muon"))
    assert min(deviations(other, one)) > 1e-3
