"""launch/sweep.sh: the lines of a file, one run after the other."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from distgpt.config import Config, to_toml, with_absolute_paths
from distgpt.errors import STOP_SIGNALS, DataError, UsageError
from distgpt.launch import local, sweep
from distgpt.launch.agent import Supervisor
from tests import jobs
from tests.launch.launching import launch

STEPS = "--train.steps=2"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of three runs, in the working directory."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.txt"
    file.write_bytes(b'# by learning rate\r\n--optim.lr=2e-3\r\n\r\n--optim.lr=4e-3 --run.dir="a b"\n--optim.lr=8e-3\n')
    return file


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The run directories in which training began; each run ends at once at its last step, without torchrun."""
    begun: list[str] = []

    def train(config: Config, arguments: list[str], supervisor: Supervisor) -> int:
        begun.append(str(config.run_dir))
        config.run_dir.mkdir(parents=True, exist_ok=True)
        (config.run_dir / "config.toml").write_text(to_toml(with_absolute_paths(config)))
        report = {"code": 0, "cause": "done", "step": config.train.steps}
        (config.run_dir / "exit.json").write_text(json.dumps(report))
        return 0

    handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGQUIT)}
    monkeypatch.setattr(local, "train", train)
    yield begun
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_each_line_has_a_run_of_its_own(file: Path) -> None:
    """The directories are those of the tasks of an array of Slurm, which counts lines from 0."""
    lines = sweep.read_sweep(file, ["quickstart", STEPS])
    assert [(line.number, str(line.config.run_dir), line.config.optim.lr) for line in lines] == [
        (2, "runs/quickstart-1", 2e-3),
        (4, "a b", 4e-3),
        (5, "runs/quickstart-4", 8e-3),
    ]
    assert {line.config.train.steps for line in lines} == {2}


def test_what_is_done_is_skipped_until_it_gets_more_steps(
    file: Path, trained: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(file), STEPS]) == 0
    assert sweep.main([str(file), STEPS]) == 0
    assert trained == ["runs/stdlib-1", "a b", "runs/stdlib-4"]
    assert "distgpt: line 4, a b: done before\n" in capfd.readouterr().err
    assert sweep.main([str(file), "--train.steps=3"]) == 0
    assert len(trained) == 6


def test_a_line_that_was_changed_is_not_taken_for_done(
    file: Path, trained: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    sweep.main([str(file), STEPS])
    file.write_text(file.read_text().replace("8e-3", "9e-3"))
    assert sweep.main([str(file), STEPS]) == 2
    assert "runs/stdlib-4 has a run with other options (optim.lr 0.008 -> 0.009): " in capfd.readouterr().err
    assert len(trained) == 3


def test_the_sweep_goes_on_after_a_failure_and_names_it(
    file: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train = local.train

    def fail_once(config: Config, arguments: list[str], supervisor: Supervisor) -> int:
        if str(config.run_dir) == "a b":
            raise DataError("no prepared data")
        return train(config, arguments, supervisor)

    monkeypatch.setattr(local, "train", fail_once)
    assert sweep.main([str(file), STEPS]) == 65
    assert trained == ["runs/stdlib-1", "runs/stdlib-4"]
    assert capfd.readouterr().err.splitlines()[-2:] == [
        "distgpt: line 4, a b: failed with code 65",
        "distgpt: error: 1 of 3 runs failed: run it again to try them again",
    ]


def test_one_signal_ends_the_sweep_after_the_run_in_progress(
    file: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(config: Config, arguments: list[str], supervisor: Supervisor) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        trained.append("stopped")
        return 75

    monkeypatch.setattr(local, "train", stop)
    assert sweep.main([str(file), STEPS]) == 75
    assert trained == ["stopped"]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "distgpt: stopped by SIGTERM at line 2, runs/stdlib-1: run it again to go on"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("\n# nothing\n", "has no line of flags"),
        ("--train.steps=2\n--train.step=2", "line 2: unknown key train.step: did you mean train.steps"),
        ('--run.dir="a', "line 1: No closing quotation"),
        ("--run.dir=a\n\n--run.dir=./a", r"lines 1 and 3 have the same run\.dir"),
    ],
)
def test_a_file_that_cannot_work_starts_nothing(file: Path, trained: list[str], text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError, match=problem):
        sweep.main([str(file)])
    assert trained == []


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none cannot be read"):
        sweep.main([str(tmp_path / "none")])


@pytest.mark.slow
def test_the_script_trains_what_it_can_and_goes_on_where_it_stopped(prepared: Path, tmp_path: Path) -> None:
    """The second line finds no data at first."""
    (tmp_path / "sweep.txt").write_text(f"--data.path={prepared} {STEPS}\n--data.path=later {STEPS}\n")
    flags = [flag for flag in jobs.TINY if not flag.startswith("--train.steps")]
    first = launch(tmp_path, "sweep.sh", "sweep.txt", *flags, "--run.dir=run", **jobs.environment())
    assert first.code == 65, first
    assert jobs.exit_report(tmp_path / "run-0")["step"] == 2
    assert first.stderr.splitlines()[-2:] == [
        "distgpt: line 2, run-1: failed with code 65",
        "distgpt: error: 1 of 2 runs failed: run it again to try them again",
    ]
    (tmp_path / "later").symlink_to(prepared)
    second = launch(tmp_path, "sweep.sh", "sweep.txt", *flags, "--run.dir=run", **jobs.environment())
    assert second.code == 0, second
    assert "distgpt: line 1, run-0: done before\n" in second.stderr
    assert jobs.exit_report(tmp_path / "run-1")["step"] == 2
