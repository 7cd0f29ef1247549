"""Kill a run, or stop it while another job takes over, at every system call that changes a file.

Afterwards there are the old checkpoints, perhaps with the new one, all of them whole, and the next run goes on.
"""

import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distgpt.checkpoint.manifest import committed, find_damage
from distgpt.run.paths import RunPaths
from tests import jobs
from tests.checkpoint.checkpoints import flip_bit
from tests.storms.conftest import Storm, Table
from tests.storms.forked_runs import Ended, ForkedRuns

pytestmark = pytest.mark.storm
TITLE = "Killed or stopped in a save"
FULL_ONLY = "only with --storms"


@pytest.fixture(scope="module", params=["whole", "newest damaged"])
def before(
    request: pytest.FixtureRequest, forked_runs: ForkedRuns, tmp_path_factory: pytest.TempPathFactory, storm: Storm
) -> Path:
    """A run with steps 2 and 3, or with step 3 damaged, an earlier broken one, and left-over files."""
    return make_run(
        forked_runs, tmp_path_factory.mktemp("before") / "run", damaged=request.param != "whole", world=1, storm=storm
    )


def make_run(forked_runs: ForkedRuns, run: Path, *, damaged: bool, world: int, storm: Storm) -> Path:
    if damaged and not storm.full:
        pytest.skip(FULL_ONLY)
    for step in range(3):
        ended = forked_runs.run(run, world=world)
        assert (ended.code, ended.step) == (0, step)
    if damaged:
        flip_bit(run / "checkpoints" / "step-00000003" / "__0_0.distcp", random.Random(0))
        (run / "checkpoints" / "broken-step-00000002-1").mkdir()
        left = run / "checkpoints" / ".staging-000001-there-1" / "step-00000003"
        shutil.copytree(run / "checkpoints" / "step-00000002", left)
    return run


@pytest.mark.parametrize("how", ["kill", "tear"])
def test_a_kill_before_each_call(
    forked_runs: ForkedRuns, before: Path, how: str, tmp_path: Path, storm: Storm, table: Table
) -> None:
    if how == "tear" and not storm.full:
        pytest.skip(FULL_ONLY)
    strike(forked_runs, before, how, tmp_path, choose_calls(24, storm), table, world=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_of_one_of_two_ranks(
    forked_runs: ForkedRuns, rank: int, tmp_path: Path, storm: Storm, table: Table
) -> None:
    if not storm.full:
        pytest.skip(FULL_ONLY)
    run = make_run(forked_runs, tmp_path / "before", damaged=False, world=2, storm=storm)
    strike(forked_runs, run, "kill", tmp_path, choose_calls(60, Storm(False, storm.seed)), table, world=2, rank=rank)


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    forked_runs: ForkedRuns, before: Path, tmp_path: Path
) -> None:
    """No kill can show this, since the kernel keeps what a process wrote. Only a power cut could."""
    run = copy_run(before, tmp_path / "run")
    ended = forked_runs.run(run)
    assert ended.step is not None
    name = f"step-{ended.step + 1:08d}"
    commit = next(
        at for at, call in enumerate(ended.calls) if re.fullmatch(rf"rename \S+ \S+/checkpoints/{name}", call)
    )
    staged = rf"\S+/checkpoints/\.staging-[^/]+/{name}"
    for file in (run / "checkpoints" / name).iterdir():
        path = rf"{staged}/{re.escape(file.name)}(\S*\.tmp)?"
        writes, syncs = (calls_like(ended.calls, f"{call} {path}") for call in ("write", "fsync"))
        assert writes, file
        assert any(writes[-1] < at < commit for at in syncs), file
        assert any(writes[-1] < at < commit for at in calls_like(ended.calls, f"fsync {staged}")), file
    assert any(at > commit for at in calls_like(ended.calls, r"fsync \S+/checkpoints"))


def calls_like(calls: list[str], pattern: str) -> list[int]:
    return [at for at, call in enumerate(calls) if re.fullmatch(pattern, call)]


def test_a_stop_before_each_call_while_another_job_takes_over(
    forked_runs: ForkedRuns, before: Path, tmp_path: Path, storm: Storm, table: Table
) -> None:
    """The stopped run has another boot id, as on another host, so the next run can only wait for its lease to expire.

    When the stopped run wakes up, it may change no checkpoint. If it was stopped between a check of the owner and a
    write, that write may still happen: to its own event file, metrics.jsonl, or a staging directory that is never
    committed.
    """
    chosen = choose_calls(8, storm)(forked_runs.run(copy_run(before, tmp_path / "reference")).calls)
    refused = late_writes = 0
    for at in chosen:
        run = copy_run(before, tmp_path / "run")
        stopped = forked_runs.run(run, "stop", at, boot="elsewhere")
        assert stopped.stopped
        owned = any(call.startswith("rename") and call.endswith("/LOCK") for call in stopped.calls[:-1])
        # A run that does not own the directory yet may already hold the file lock, since it is on the same host.
        assert forked_runs.run(run).code in ((0,) if owned else (0, 73)), describe(at, stopped)
        seen = contents(run)
        woken = forked_runs.wake()
        if not owned:
            assert woken.code == 0, describe(at, stopped)  # it did not own the directory before
        elif any(call.startswith("open") and "exit.json" in call for call in stopped.calls):
            # It had already finished, unless the thread that renews its lease wakes up first.
            assert woken.code in (0, 73), describe(at, stopped)
        else:
            assert woken.code == 73, describe(at, stopped)
            changed = {name for name, _ in contents(run).items() ^ seen.items()}
            harmless = (".metrics.jsonl", "metrics.jsonl", "tb/", "checkpoints/.staging-")
            assert all(name.startswith(harmless) for name in changed), describe(at, stopped)
            refused += 1
            late_writes += bool(changed)
        for late in (run / "checkpoints").glob(".staging-*"):
            shutil.rmtree(late)
        assert_sound(run, describe(at, stopped))
        shutil.rmtree(run)
    name = f"stopped before a call, woken after a takeover ({describe_run(before)})"
    table(
        "Stopped and woken",
        {"storm": name, "places": len(chosen), "ended with 73": refused, "one late write": late_writes},
    )


def strike(
    forked_runs: ForkedRuns,
    before: Path,
    how: str,
    tmp_path: Path,
    draw: Callable[[list[str]], list[int]],
    table: Table,
    *,
    world: int,
    rank: int = 0,
) -> None:
    """Kill a run at each call that `draw` chooses from those of an uninterrupted run, and run it again."""
    reference = forked_runs.run(copy_run(before, tmp_path / "reference"), world=world, rank=rank)
    assert reference.code == 0
    after = forked_runs.run(tmp_path / "reference", world=world)
    digests = {reference.step: reference.digest, after.step: after.digest}
    chosen = draw(reference.calls)
    went_on = dict.fromkeys(digests, 0)
    for at in chosen:
        run = copy_run(before, tmp_path / "run")
        killed = forked_runs.run(run, how, at, world=world, rank=rank)
        assert killed.code == -signal.SIGKILL, describe(at, killed)
        newest = next(path for path in committed(run / "checkpoints") if not find_damage(path))
        assert int(newest.name[5:]) in digests, describe(at, killed)
        again = forked_runs.run(run, world=world)
        assert again.code == 0, describe(at, killed)
        assert again.step == int(newest.name[5:]), describe(at, killed)
        assert again.digest == digests[again.step], describe(at, killed)
        went_on[again.step] += 1
        assert_sound(run, describe(at, killed))
        shutil.rmtree(run)
    old, new = went_on.values()
    name = {"kill": "killed before a call", "tear": "killed in the middle of a call"}[how]
    where = f"rank {rank} of 2" if world > 1 else describe_run(before)
    table(
        TITLE,
        {"storm": f"{name} ({where})", "places": len(chosen), "old": old, "new": new, "mixed": 0},
    )


def choose_calls(short: int, storm: Storm) -> Callable[[list[str]], list[int]]:
    """Return a function that chooses call numbers, from 1: all with --storms, else `short` ones of different kinds."""

    def draw(calls: list[str]) -> list[int]:
        if storm.full:
            return list(range(1, len(calls) + 1))
        by_kind: dict[str, list[int]] = {}
        for at, call in enumerate(calls, 1):
            by_kind.setdefault(re.sub(r"\d+", "", call), []).append(at)
        random_ = random.Random(storm.seed)
        kinds = random_.sample(sorted(by_kind), min(short, len(by_kind)))
        return sorted(random_.choice(by_kind[kind]) for kind in kinds)

    return draw


def copy_run(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


def assert_sound(run: Path, why: str) -> None:
    """Check that nothing is incomplete, no step is logged twice, and the last run ended normally."""
    names = jobs.checkpoints(run)
    assert [name for name in names if not name.startswith(("step-", "broken-"))] == [], why
    assert len([name for name in names if name.startswith("broken-")]) <= 1, why
    assert len([name for name in names if name.startswith("step-")]) <= 3, why
    assert all(not find_damage(path) for path in committed(run / "checkpoints")), why
    jobs.val_losses(run)
    assert jobs.exit_report(run)["code"] == 0, why
    assert RunPaths(run).lock.exists()


def contents(run: Path) -> dict[str, bytes]:
    """Read every file except the logs, by its path in the run directory."""
    files = [file for file in run.rglob("*") if file.is_file() and file.parent.name != "logs"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def describe_run(before: Path) -> str:
    damaged = any(path.name.startswith("broken-") for path in (before / "checkpoints").iterdir())
    return "the newest one damaged before" if damaged else "all whole before"


def describe(at: int, ended: Ended) -> str:
    return f"call {at}: {ended.calls[at - 1] if len(ended.calls) >= at else '?'}, exit code {ended.code}"
