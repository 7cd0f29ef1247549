"""A rank that hangs stops all: it is named, every rank writes its stacks, and all are ended."""

import re
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.end_to_end.conftest import tiny

SLOW = Path(__file__).with_name("slow.py")


def hanging(slow: str, *arguments: str) -> jobs.Ended:
    """Train with two ranks, one of which hangs as slow.py makes it, until the watchdog ends them."""
    return jobs.run(jobs.torchrun_command(2, *arguments, "--health.start_timeout=20", script=SLOW), SLOW=slow)


HANGING_DISK = """
import runpy, time
from distgpt.corpus import shards
shards.verify_dataset = lambda dataset: time.sleep(600)
runpy.run_module("distgpt.train", run_name="__main__", alter_sys=True)
"""


def test_a_disk_that_hangs_while_the_data_are_verified_is_named(prepared: Path, tmp_path: Path) -> None:
    done = jobs.run(
        [sys.executable, "-c", HANGING_DISK, *tiny(prepared, tmp_path), "--health.start_timeout=5"],
    )
    assert done.code == 75
    assert ", verifying the data); the stacks of all ranks are in " in jobs.exit_report(tmp_path)["cause"]
    assert "in <lambda>\n" in (tmp_path / "logs" / "rank-0.log").read_text()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_whose_data_never_come_is_named(prepared: Path, tmp_path: Path, strategy: str) -> None:
    """The other rank waits for it, some heartbeats ahead, in a backward pass, or in a forward pass for its shards."""
    done = hanging("read:600:1", *tiny(prepared, tmp_path), f"--parallel.strategy={strategy}")
    report = jobs.exit_report(tmp_path)
    assert report["code"] == 75
    assert "rank 1 (pid " in report["cause"]
    assert ", waiting for data) made less progress than the others; the stacks of all ranks are in " in report["cause"]
    assert "rank 0" not in report["cause"]
    assert f"distgpt: {report['cause']}\n" in done.stderr
    assert "in slow_read\n" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert "in accumulate_gradients\n" in (tmp_path / "logs" / "rank-0.log").read_text()
    assert sorted(path.name for path in (tmp_path / "logs").glob("flight-recorder-rank-*")) == [
        "flight-recorder-rank-0",
        "flight-recorder-rank-1",
    ]


def test_a_rank_that_hangs_in_a_backward_pass_is_identified_by_its_line(prepared: Path, tmp_path: Path) -> None:
    """Rank 0 waits for it in the same pass, with an equal number of heartbeats, although it had more to do before."""
    hanging("backward:600:0", *tiny(prepared, tmp_path), "--train.global_batch=4")
    cause = jobs.exit_report(tmp_path)["cause"]
    assert "all ranks made equal progress (" in cause
    assert re.search(r"rank 0 at slow\.py:\d+ in sleeping", cause)
    assert re.search(r"rank 1 at graph\.py:\d+ in ", cause)
