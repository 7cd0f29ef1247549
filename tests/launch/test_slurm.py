"""The decisions of slurm/train.sh, tested without Slurm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distgpt.errors import Interrupted, UsageError
from distgpt.launch import slurm
from distgpt.preflight import network


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "exit.json"
    monkeypatch.setenv("DISTGPT_EXIT_FILE", str(file))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return file


@pytest.mark.parametrize(
    ("code", "step", "restarts", "decided", "cause"),
    [
        (0, 24, "0", 0, "done"),
        (0, 23, "0", 75, "ended at step 23 of 24"),
        (75, 8, "0", 75, "done"),
        (73, None, "0", 73, "done"),
        (73, None, "1", 75, "done"),
        (65, None, "1", 65, "done"),
    ],
)
def test_the_report_decides(
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    step: int | None,
    restarts: str,
    decided: int,
    cause: str,
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    report.write_text(json.dumps({"code": code, "cause": "done", "step": step}))
    ending = slurm.ending_of(report.parent, "run", 24, "distgpt.train", 1)
    assert (ending.code, ending.cause) == (decided, cause)


def test_what_never_started_has_not_succeeded(report: Path) -> None:
    ending = slurm.ending_of(report.parent, "run", 24, "distgpt.train", 0)
    assert (ending.code, ending.cause) == (75, f"no rank could report how it ended, see {report.parent}")
    assert slurm.ending_of(report.parent, "run", 24, "distgpt.doctor", 0).code == 0
    assert slurm.ending_of(report.parent, "run", 24, "distgpt.doctor", 1).code == 75
    full = slurm.ending_of(report.parent / "missing", "run", 24, "distgpt.train", 1)
    assert (full.code, full.cause) == (74, "cannot write in run: make room and submit it again to go on")


def test_attempts_without_progress_are_few(tmp_path: Path) -> None:
    slurm.require_progress(tmp_path, "no checkpoint", 2)
    for _ in range(2):
        slurm.require_progress(tmp_path, "step-00000004", 2)
    gave_up = r"gave up after 2 attempts without a new checkpoint \(newest: step-00000004\)"
    with pytest.raises(Interrupted, match=gave_up):
        slurm.require_progress(tmp_path, "step-00000004", 2)


def test_a_line_of_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "sweep"
    file.write_bytes(b'--optim.lr=1e-3\r\n--run.dir="a b" --train.steps=2\r\n\r\n"\r\n')
    assert slurm.sweep_flags(str(file), 1) == ["--run.dir=a b", "--train.steps=2"]
    for task, why in ((2, "no flags"), (3, "No closing quotation"), (4, "no flags")):
        with pytest.raises(UsageError, match=f"{why} in line {task + 1}, the line of task {task}"):
            slurm.sweep_flags(str(file), task)
    with pytest.raises(UsageError, match="DISTGPT_SWEEP= cannot be read"):
        slurm.sweep_flags("", 0)


def test_progress_is_the_newest_training_line(tmp_path: Path) -> None:
    assert slurm.progress(tmp_path, 24) == ""
    lines = [{"step": 4, "loss": 3.21987, "seconds": 4500.0}, {"step": 4, "val_loss": 3.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    assert slurm.progress(tmp_path, 24) == "step 4/24 loss 3.2199 ETA 1-01:00:00"


def test_bash_reads_the_answer(tmp_path: Path) -> None:
    words = ["", "a b", "it's", "two\nlines'\n\"", "$HOME `x` \\n", "--a=*"]
    line = slurm.bash_assignments({"word": words[3], "words": words})
    assert "\n" not in line
    script = 'eval "$1"; printf "%s\\0" "$word" "${words[@]}"'
    read = subprocess.run(["bash", "-c", script, "bash", line], capture_output=True, text=True, check=True)
    assert read.stdout.split("\0") == [words[3], *words, ""]


@pytest.mark.parametrize(
    ("node", "address"),
    [("NodeAddr=127.0.0.1 x=y", "127.0.0.1"), ("NodeAddr=localhost", "10.1.2.3"), ("NodeAddr=no.invalid", "10.1.2.3")],
)
def test_the_address_of_a_node_is_one_that_others_find(
    monkeypatch: pytest.MonkeyPatch, node: str, address: str
) -> None:
    monkeypatch.setattr(network, "first_address", lambda: "10.1.2.3")
    monkeypatch.setenv(slurm.NODE_VARIABLE, f"NodeName=n1 {node}")
    assert slurm.own_address() == address


def test_launchers_start_without_torch() -> None:
    program = "import sys, distgpt.launch.__main__, distgpt.launch.slurm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
