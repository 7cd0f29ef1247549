"""The same steps in every topology: the same losses and gradient norms. docs/equivalence.md has what was found."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import pytest

from tests import jobs
from tests.end_to_end import equivalence
from tests.end_to_end.equivalence import (
    ALL,
    CORNERS,
    EXACT,
    EXACT_CORNERS,
    Cell,
    Outcome,
    deviation,
    deviations,
    exact_table,
    table,
    trained,
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
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Outcome]:
    """The corners of the matrix or, with --storms, all of it."""
    storms = request.config.getoption("--storms")
    cells, steps = ([*ALL, *EXACT], STEPS) if storms else ([*CORNERS, *EXACT_CORNERS], FEWER_STEPS)
    return trained(with_references(cells), steps, tmp_path_factory.mktemp("equivalence"), start=start)


def start(command: Sequence[str], rank: int, output: int) -> equivalence.Process:
    """Start the process of a rank as a fork."""
    return jobs.start(command, stdout=output, stderr=output, variables={"RANK": str(rank)})


def page_with(table: str) -> str:
    """Return the page with another table."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{table}\n\n{end}{after}"


def without_figures(text: str) -> str:
    return re.sub(r"\d\.\de[+-]\d\d|`[0-9a-f]{16}`", "?", text)


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
    outcomes: dict[Cell, Outcome], request: pytest.FixtureRequest
) -> None:
    """With --storms, the tables in docs/ are written anew; otherwise they must be those of these cells."""
    found = deviations(outcomes)
    for cell, (loss, norm) in found.items():
        most = TOLERANCE[cell.dtype]
        assert loss <= most[0], cell
        assert norm <= most[1], cell
    if request.config.getoption("--storms"):
        PAGE.write_text(page_with(f"{table(found)}\n\n{exact_table(outcomes)}"), encoding="utf-8")
    zeros = table(dict.fromkeys(ALL, (0.0, 0.0)))
    nothing = exact_table(dict.fromkeys(EXACT, Outcome([], "0" * 64)))
    expected = page_with(f"{zeros}\n\n{nothing}")
    assert without_figures(PAGE.read_text(encoding="utf-8")) == without_figures(expected)


@pytest.mark.storm
@pytest.mark.timeout(3600)
def test_exact_sums_give_the_same_bits_in_every_topology(outcomes: dict[Cell, Outcome]) -> None:
    different = [cell for cell in outcomes if cell.exact and outcomes[cell] != outcomes[cell.reference()]]
    assert different == []
    # Without exact sums, rounding shows.
    weights = {outcome.weights for cell, outcome in outcomes.items() if not cell.exact and cell.dtype == "float32"}
    assert len(weights) > 2


def test_recomputed_activations_change_no_bit(outcomes: dict[Cell, Outcome]) -> None:
    pairs = [(cell, replace(cell, recompute=False)) for cell in outcomes if cell.recompute]
    compared = [cell for cell, other in pairs if other in outcomes]
    assert compared
    assert [cell for cell in compared if outcomes[cell] != outcomes[replace(cell, recompute=False)]] == []


def test_what_changes_the_result_shows(outcomes: dict[Cell, Outcome]) -> None:
    one, other = (outcomes[Cell(1, "single", 1, False, "float32", optimizer)] for optimizer in ("adamw", "muon"))
    assert min(deviation(other.curve, one.curve)) > 1e-3
