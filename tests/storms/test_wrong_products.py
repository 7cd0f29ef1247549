"""Bits that flip in matrix products of one rank: each that changes a gradient is found, and no other rank is named.

A fault that is always there can be told from the other rank's results only by a third rank; of two ranks, both are
named.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests import jobs
from tests.storms import wrong_products
from tests.storms.conftest import Storm, Table

pytestmark = pytest.mark.storm
TITLE = "Bits flipped in matrix products of one rank"


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_wrong_product_is_found_and_its_rank_named(ranks: int, tmp_path: Path, storm: Storm, table: Table) -> None:
    arguments = [str(ranks), str(storm.size(short=10, long=200)), str(storm.seed), str(tmp_path)]
    command = [sys.executable, "-m", wrong_products.__name__, *arguments]
    with tempfile.TemporaryFile("w+") as output:
        number = output.fileno()
        started = [
            jobs.start(command, stdout=number, stderr=number, variables={"RANK": str(rank)}) for rank in range(ranks)
        ]
        codes = [process.wait() for process in started]
        output.seek(0)
        assert not any(codes), output.read()
    outcomes: Counter[str] = Counter()
    for result in json.loads((tmp_path / "results.json").read_text()):
        trial, named = result["trial"], [int(rank) for rank in re.findall(r"rank (\d+) on", result["message"])]
        if named == [trial["rank"]]:
            outcomes["named"] += 1
        elif named == [0, 1] and ranks == 2 and trial["constant"]:
            outcomes["one of both"] += 1
        else:
            assert not named, result
            assert not result["changed"], result
            outcomes["no gradient changed"] += 1
    assert outcomes["named"]
    kinds = {kind: outcomes[kind] for kind in ("named", "one of both", "no gradient changed")}
    table(TITLE, {"ranks": ranks, "flips": sum(kinds.values()), **kinds, "missed": 0})
