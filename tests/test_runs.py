"""The table of runs: what each run is doing, read from its files alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distgpt import runs
from distgpt.cli import runs_options
from distgpt.config import resolve, to_toml
from distgpt.errors import UsageError
from distgpt.run.exit_report import write_exit_report
from distgpt.run.lock import LEASE, RunLock
from distgpt.run.paths import RunPaths
from tests import jobs
from tests.end_to_end.test_sample import CTRL_C, Terminal

CAUSE = "loss is not finite at step 8: lower optim.lr, or look at the step with python -m distgpt.replay RUN --step 8"


def ended(root: Path, code: int, cause: str) -> RunPaths:
    """Leave a run as one that ended at step 8 of 60, and evaluated step 6."""
    paths = RunPaths(root)
    paths.checkpoints.mkdir(parents=True)
    (paths.checkpoints / "weights").write_bytes(bytes(2**20))
    paths.config.write_text(to_toml(resolve(["--train.steps=60"], {})))
    lines = [{"step": 6, "val_loss": 3.5}, {"step": 8, "loss": 2.25, "tokens_per_second": 12345.0}]
    paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "loss": 1')
    lock = RunLock(paths)
    assert write_exit_report(paths, code=code, cause=cause, rank=0, step=8, fence=lock.owner.fence)
    lock.release()
    return paths


def test_the_table_has_all_states_and_fits_80_columns(tmp_path: Path) -> None:
    ended(tmp_path / "done", 0, "done")
    ended(tmp_path / "deep" / "below" / "failed", 65, CAUSE)
    ended(tmp_path / "stopped", 75, "interrupted by SIGTERM: step 8 of 60 is saved, run it again to go on")
    ended(tmp_path / ("a-name-that-is-long-" * 5 + "7"), 0, "done")
    ended(tmp_path / ".hidden" / "run", 0, "done")
    running = RunLock(ended(tmp_path / "running", 75, "once"))  # it goes on
    killed = RunPaths(tmp_path / "killed")
    held = RunLock(killed)
    os.utime(killed.lock, (killed.lock.stat().st_mtime - LEASE - 1,) * 2)
    found = {Path(run.path).name[:10]: run for run in runs.read_runs(tmp_path)}
    assert {name: (run.state, run.code) for name, run in found.items()} == {
        "done": ("done", 0),
        "failed": ("failed", 65),
        "stopped": ("interrupted", 75),
        "a-name-tha": ("done", 0),
        "running": ("running", None),
        "killed": ("interrupted", None),
    }
    for run in (found["done"], found["running"]):
        assert (run.step, run.steps, run.loss, run.val_loss, run.tokens_per_second) == (8, 60, 2.25, 3.5, 12345.0)
        assert 2**20 < run.bytes < 2**20 + 2**14
    lines = runs.table(runs.read_runs(tmp_path), tmp_path, 80)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "8/60  2.250  3.500  12.3k" in text
    assert "long-7  done" in text
    for cause in (CAUSE, "interrupted by SIGTERM: step 8 of 60 is saved", "killed, or its machine was lost"):
        assert cause in " ".join(text.split())
    assert "run it again" not in text
    running.release()
    held.release()


@pytest.mark.slow
def test_the_command_imports_no_torch_and_prints_json(tmp_path: Path) -> None:
    ended(tmp_path / "one", 0, "done")
    code = "import sys; from distgpt import cli\ntry: cli.run('runs')\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, env=jobs.environment())
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = map(json.loads, done.stdout.splitlines())
    assert line.items() >= {"path": str(tmp_path / "one"), "state": "done", "step": 8, "steps": 60}.items()


@pytest.mark.slow
@jobs.linux_only
def test_watching_shows_what_changes_until_ctrl_c(tmp_path: Path) -> None:
    ended(tmp_path / "one", 75, "interrupted by SIGTERM")
    terminal = Terminal(sys.executable, "-m", "distgpt.runs", str(tmp_path), "--watch")
    terminal.read_until("one  interrupted")
    ended(tmp_path / "two", 0, "done")
    terminal.read_until("two  done")
    terminal.type(CTRL_C)
    assert terminal.wait() == 0


def test_an_empty_directory_has_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.main(*runs_options([str(tmp_path)]))
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    runs.main(*runs_options([str(tmp_path), "--json"]))
    assert capsys.readouterr().out == "", "no line, since an empty one is no JSON"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "nowhere is not a directory: give the one that holds your runs"),
        ([".", "--watch"], "--watch needs"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        runs.main(*runs_options(arguments))
