"""A user's mistake gives its exit code and exactly one line on stderr: what is wrong, and what would work."""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distgpt.run.lock import RunLock
from distgpt.run.paths import RunPaths
from tests import jobs
from tests.end_to_end.conftest import Trained, tiny

# The case, its exit code, and a pattern that the line must match to its end.
EXPECTED = {
    "missing data": (65, r"no prepared data in \S+/none: run python -m distgpt.prepare --input ... --output \S+/none"),
    "not a dataset": (65, r"\S+/empty is not a dataset, it has no meta.json: run python -m distgpt.prepare .*"),
    "cut short": (65, r"\S+/train-00000.bin is cut short: [\d,]+ bytes instead of [\d,]+; prepare it again .*"),
    "flipped byte": (65, r"\S+/val-00000.bin is damaged: its SHA-256 is \w{16}\.\.\., not \w{16}\.\.\.; prepare .*"),
    "foreign token": (65, r"\S+/train-00000.bin is damaged: token 1,000 is 999, outside the vocabulary of [\d,]+; .*"),
    "short corpus": (65, r".*val.*"),
    "batch over ranks": (2, r"train.global_batch 8 does not divide over 3 ranks: take a global_batch of 6 or 9, or .*"),
    "ranks over GPUs": (2, r"2 ranks on this host but 1 GPUs: use --nproc_per_node=1"),
    "stale variables": (2, r"the environment has RANK=3 WORLD_SIZE=8, but no launcher started this process: unset .*"),
    "micro batch": (2, r"train.micro_batch is 3, which does not divide train.global_batch = 8: take 1 or 2 or 4 or 8"),
    "head count": (2, r"model.n_head is 3, which does not divide model.n_embd = 16: take 1 or 2 or 4 or 8"),
    "unknown key": (2, r"unknown key train.step: did you mean train.steps\?"),
    "wrong type": (2, r"train.steps is 'many': it must be a whole number"),
    "another model": (2, r"\S+/step-00000036 was made by another run: model.n_layer 2 -> 3; resume with the same .*"),
    "another vocabulary": (
        2,
        r"\S+ was made by another run: vocabulary \d+ -> 10; data \w{12} \(\S+\) -> \w{12} \(\S+/digits\); .*",
    ),
    "in use": (73, r"the run directory \S+/used is in use by pid {pid} on {host} since \d{{4}}-.*; wait for it or .*"),
    "run dir under a file": (73, r"cannot write to the run directory \S+/file/run: Not a directory; choose another .*"),
    "NaN": (65, r"loss \S+ and gradient norm \S+ at step \d: stopped before the update; samples \d+ to \d+ .*"),
    "NaN for good": (
        65,
        r"loss \S+ and gradient norm \S+ at step \d\d: stopped before the update, after 10 skipped in a row; .*",
    ),
    "infinite weights": (65, r"weights are not finite after step 1: nothing is saved; lower optim.lr"),
}


LAUNCHER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}

# distgpt.train on a machine that seems to have a GPU.
ONE_GPU = """
import runpy, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
runpy.run_module("distgpt.train", run_name="__main__")
"""


@pytest.fixture(scope="module")
def cases(
    whole: Callable[[str], Trained], prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, jobs.Ended]]:
    """Run every case in one process."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    (root / "file").write_text("")

    def copied(name: str) -> Path:
        return Path(shutil.copytree(prepared, root / name, ignore=shutil.ignore_patterns(".verified.json")))

    cut = copied("cut")
    os.truncate(cut / "train-00000.bin", (cut / "train-00000.bin").stat().st_size // 2)
    overwrite(copied("flipped") / "val-00000.bin", 5000, lambda byte: 0 if byte else 1)
    overwrite(copied("foreign") / "train-00000.bin", 2000, lambda byte: 999 & 255)
    overwrite(root / "foreign" / "train-00000.bin", 2001, lambda byte: 999 >> 8)
    (root / "digits.txt").write_text("0123456789" * 1000)
    (root / "few.txt").write_text("0123456789" * 9)
    for name in ("digits", "few"):
        made = jobs.command("prepare", "--input", root / f"{name}.txt", "--output", root / name, "--tokenizer", "char")
        assert made.code == 0, made
    lock = RunLock(RunPaths(root / "used"))

    run = shutil.copytree(whole("single").run, root / "done")
    fresh = root / "run"  # no case writes to it

    def case(*arguments: str, data: Path = prepared, run: Path = fresh) -> Callable[[], jobs.Ended]:
        return lambda: jobs.command("train", *tiny(data, run), *arguments)

    found = jobs.run_all(
        {
            "missing data": case(data=root / "none"),
            "not a dataset": case(data=root / "empty"),
            "cut short": case(data=cut),
            "flipped byte": case(data=root / "flipped", run=root / "run-flipped"),
            "foreign token": case(data=root / "foreign", run=root / "run-foreign"),
            "short corpus": case(data=root / "few", run=root / "run-short"),
            "batch over ranks": lambda: jobs.command("train", *tiny(prepared, fresh), WORLD_SIZE="3", **LAUNCHER),
            "ranks over GPUs": lambda: jobs.run(
                [sys.executable, "-c", ONE_GPU, *tiny(prepared, fresh)], LOCAL_WORLD_SIZE="2", **LAUNCHER
            ),
            "stale variables": lambda: jobs.command("train", *tiny(prepared, fresh), RANK="3", WORLD_SIZE="8"),
            "micro batch": case("--train.micro_batch=3"),
            "head count": case("--model.n_head=3"),
            "unknown key": case("--train.step=3"),
            "wrong type": case("--train.steps=many"),
            "another model": case("--model.n_layer=3", run=run),
            "another vocabulary": case(data=root / "digits", run=run),
            "in use": case(run=root / "used"),
            "run dir under a file": case(run=root / "file" / "run"),
            "NaN": case("--optim.lr=1e30", run=root / "nan"),
            "NaN for good": case(
                *("--optim.lr=1e30", "--health.on_nonfinite=skip", "--checkpoint.every=0", "--eval.every=0"),
                run=root / "nan-for-good",
            ),
            "infinite weights": case("--optim.lr=1e38", "--eval.every=1", run=root / "infinite"),
        }
    )
    yield found
    lock.release()
    assert not fresh.exists()


@pytest.mark.parametrize("name", EXPECTED)
def test_one_line_and_its_exit_code(cases: dict[str, jobs.Ended], name: str) -> None:
    code, pattern = EXPECTED[name]
    if name == "in use":
        pattern = pattern.format(pid=os.getpid(), host=re.escape(socket.gethostname()))
    ended = cases[name]
    assert ended.code == code, ended
    assert ended.stderr.count("\n") == 1, ended
    assert re.fullmatch(rf"distgpt: error: {pattern}\n", ended.stderr), ended.stderr
    if name not in ("NaN", "NaN for good", "infinite weights"):
        assert " | loss " not in ended.stdout


def test_a_read_only_run_directory(prepared: Path, tmp_path: Path) -> None:
    with jobs.disk(tmp_path / "disk", "ro") as disk:
        ended = jobs.command("train", *tiny(prepared, disk / "run"))
    assert ended.code == 73
    assert ended.stderr == (
        f"distgpt: error: cannot write to the run directory {disk / 'run'}: Read-only file system; "
        "choose another with --run.dir=DIR\n"
    )


@pytest.fixture(scope="module")
def mixed_up(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[jobs.Ended, Path]:
    """A job of two ranks whose loss becomes NaN, and its run directory."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    return jobs.torchrun(2, *tiny(prepared, run), "--optim.lr=1e30", "--parallel.strategy=fsdp"), run


def test_a_nan_loss_stops_all_ranks_before_the_update(mixed_up: tuple[jobs.Ended, Path]) -> None:
    ended, run = mixed_up
    assert ended.code != 0
    assert len(ended.error_lines) == 1, ended
    assert ended.traceback == []
    report = jobs.exit_report(run)
    assert report["code"] == 65
    assert ended.error_lines == [f"distgpt: error: {report['cause']}"]
    # The unfinished step is neither logged nor saved.
    assert list(jobs.losses(run)) == list(range(1, report["step"] + 1))
    assert f"at step {report['step'] + 1}: stopped before the update" in report["cause"]
    places = []
    for rank in range(2):
        line = re.search(
            rf"ERROR step {report['step'] + 1}, windows of this rank as \(shard, token offset\): (.*)",
            (run / "logs" / f"rank-{rank}.log").read_text(),
        )
        assert line
        places += re.findall(r"\((?:np\.int64\()?(\d+)\)?, (?:np\.int64\()?(\d+)\)?\)", line[1])
    assert len(set(places)) == 8


def test_under_torchrun_a_mistake_is_printed_once(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "exit.json"
    job = jobs.Job(jobs.torchrun_command(2, *tiny(tmp_path / "none", run)), DISTGPT_EXIT_FILE=str(copy))
    ended = job.finish()
    assert ended.code != 0
    assert ended.error_lines == [
        f"distgpt: error: no prepared data in {tmp_path / 'none'}: "
        f"run python -m distgpt.prepare --input ... --output {tmp_path / 'none'}"
    ]
    assert ended.traceback == []
    # The report of torchrun ends with the same line.
    assert ended.stderr.splitlines()[-2].endswith(ended.error_lines[0])
    assert json.loads(copy.read_text())["code"] == 65
    assert not run.exists()


def overwrite(file: Path, offset: int, change: Callable[[int], int]) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([change(byte)]))
