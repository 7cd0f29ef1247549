"""A profile of some steps: the files, the table, and no profiler where none is asked for."""

import gzip
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from distgpt.config import ProfileConfig, resolve
from distgpt.errors import UsageError
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession
from distgpt.telemetry import profiling
from distgpt.telemetry.profiling import profiled
from tests import jobs

CPU = torch.device("cpu")


def run(
    directory: Path,
    steps: range,
    asked: str,
    *,
    rank: int = 0,
    stop_after: int | None = None,
    device: torch.device = CPU,
) -> tuple[list[int], list[str]]:
    """Take the steps, each of which multiplies matrices; return their numbers, and what the profiler did meanwhile."""
    taken, paused = [], []

    @contextmanager
    def pausing(part: str) -> Iterator[None]:
        paused.append(part)
        yield

    directory.mkdir(exist_ok=True)
    session = RunSession(RunPaths(directory), rank)
    with closing(profiled(steps, ProfileConfig(asked), session, device, pausing=pausing)) as yielded:
        for step in yielded:
            torch.ones(64, 64) @ torch.ones(64, 64)
            taken.append(step)
            if step == stop_after:
                break
    return taken, paused


def traced_steps(directory: Path, name: str) -> int:
    """Return the number of steps in a trace."""
    events = json.loads(gzip.decompress((directory / "profile" / name).read_bytes()))["traceEvents"]
    return len({event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep")})


def test_the_steps_are_traced_and_the_longest_operators_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    taken, paused = run(tmp_path / "r", range(1, 8), "3:5")
    assert taken == [1, 2, 3, 4, 5, 6, 7]
    assert set(paused) == {"other"}
    assert [file.name for file in (tmp_path / "r" / "profile").iterdir()] == ["steps-3-5.json.gz"]
    assert traced_steps(tmp_path / "r", "steps-3-5.json.gz") == 3
    printed = capfd.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("profile   ")
    assert "https://ui.perfetto.dev" in printed
    (product,) = [line for line in lines if line.endswith("  aten::mm")]
    assert product.split()[-2] == "3", "one call in each step"
    assert max(map(len, lines[-5:])) <= 80


def test_the_profiler_prints_nothing_on_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a process of its own: where another test has run a profiler before, its log level is set and already read.
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    program = (
        "import sys, pathlib, tests.telemetry.test_profiling as it;"
        "it.run(pathlib.Path(sys.argv[1]), range(1, 8), '3:5')"
    )
    done = jobs.run([sys.executable, "-c", program, str(tmp_path / "r")])
    assert (done.code, done.stderr) == (0, ""), done


def test_a_run_that_begins_or_ends_within_the_steps_traces_what_it_takes(tmp_path: Path) -> None:
    run(tmp_path / "later", range(4, 8), "3:5")
    assert traced_steps(tmp_path / "later", "steps-4-5.json.gz") == 2
    taken, _ = run(tmp_path / "stopped", range(1, 8), "2:6", stop_after=4)
    assert taken == [1, 2, 3, 4]
    assert (tmp_path / "stopped" / "profile" / "steps-2-6.json.gz").exists()


@pytest.mark.parametrize(("asked", "rank"), [("", 0), ("3:5", 1), ("8:9", 0)])
def test_no_profiler_runs_where_none_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, rank: int
) -> None:
    monkeypatch.setattr(profiling, "profile", None)
    assert run(tmp_path, range(1, 8), asked, rank=rank) == ([1, 2, 3, 4, 5, 6, 7], [])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_its_memory_is_recorded_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    run(tmp_path, range(1, 4), "2:3", device=torch.device("cuda"))
    assert calls == [{"max_entries": profiling.MEMORY_EVENTS}, "steps-2-3-memory.pickle", {"enabled": None}]
    assert "https://pytorch.org/memory_viz" in capsys.readouterr().out


def test_a_disk_that_takes_no_profile_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("a file")
    assert run(tmp_path, range(1, 4), "2:2")[0] == [1, 2, 3]
    assert "the profile was not written: " in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["10", "10-13", "13:10", "0:3", "a:b", ":"])
def test_a_wrong_range_is_one_clear_line(asked: str) -> None:
    with pytest.raises(UsageError, match=r"profile.steps is '.*': it must be FIRST:LAST, two steps, as 10:13"):
        resolve([f"--profile.steps={asked}"], {})


def test_steps_after_the_end_are_refused() -> None:
    with pytest.raises(UsageError, match=r"profile.steps ends at 13, but train.steps is 12"):
        resolve(["--profile.steps=10:13", "--train.steps=12"], {})
