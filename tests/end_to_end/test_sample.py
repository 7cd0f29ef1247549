"""Sample from a trained run, and evaluate it."""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from distgpt import evaluate, replay
from distgpt.cli import sample_options
from distgpt.errors import UsageError
from distgpt.run.paths import RunPaths
from tests import jobs
from tests.end_to_end.conftest import Trained, tiny

PROMPT = "a golden rose"
SAMPLE = {
    "seed 1": ["--seed=1"],
    "seed 1 again": ["--seed=1"],
    "seed 2": ["--seed=2"],
    "several": ["--samples=3", f"--prompt={PROMPT}"],
    "greedy": ["--temperature=0", "--tokens=30"],
    "top k 1": ["--top-k=1", "--tokens=30"],
    "unknown character": ["--prompt=ärger ☃"],
    "bad temperature": ["--temperature=-1", f"--prompt={PROMPT}"],
    "no samples": ["--samples=0"],
    "bad seed": ["--seed=18446744073709551616"],
}


@pytest.fixture(scope="module")
def sampled(whole: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, jobs.Ended]:
    """The results of `python -m distgpt.sample` with each of these arguments."""
    run = str(whole("fsdp").run)  # one process reads what two wrote
    commands = {
        name: partial(jobs.command, "sample", run, "--tokens=100", *arguments) for name, arguments in SAMPLE.items()
    }
    commands["no run"] = partial(jobs.command, "sample", tmp_path_factory.mktemp("nowhere"))
    return jobs.run_all(commands)


def test_the_same_seed_writes_the_same_text(sampled: dict[str, jobs.Ended]) -> None:
    assert sampled["seed 1"].code == 0, sampled["seed 1"]
    assert sampled["seed 1"].stdout == sampled["seed 1 again"].stdout
    assert sampled["seed 1"].stdout != sampled["seed 2"].stdout
    assert len(sampled["seed 1"].stdout) == 101  # characters and a newline
    assert sampled["seed 1"].stderr == ""


def test_several_samples_go_on_from_the_prompt(sampled: dict[str, jobs.Ended]) -> None:
    parts = re.split(r"--- sample \d of 3 ---\n", sampled["several"].stdout)
    assert parts[0] == ""
    assert len(parts) == 4
    assert all(text.startswith(PROMPT) and len(text) == len(PROMPT) + 101 for text in parts[1:])
    assert len(set(parts[1:])) == 3


def test_greedy_sampling_takes_the_likeliest_token(sampled: dict[str, jobs.Ended]) -> None:
    assert sampled["greedy"].code == 0
    assert sampled["greedy"].stdout == sampled["top k 1"].stdout


def test_an_unknown_character_is_one_clear_line(sampled: dict[str, jobs.Ended]) -> None:
    ended = sampled["unknown character"]
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("distgpt: error: --prompt: ")
    assert "ä" in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [("bad temperature", "--temperature is -1"), ("no samples", "--samples is 0"), ("bad seed", "--seed is 184467")],
)
def test_an_impossible_request_is_one_clear_line(sampled: dict[str, jobs.Ended], name: str, line: str) -> None:
    ended = sampled[name]
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.startswith("distgpt: error: ")
    assert line in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--tokens=-3", "--tokens is -3: it cannot be negative"),
        ("--top-k=-1", "--top-k is -1: it cannot be negative"),
        ("--top-p=0", "--top-p is 0.0: it must be above 0 and at most 1"),
        ("--temperature=nan", "--temperature is nan: it must be 0 (greedy) or a positive number"),
    ],
)
def test_an_impossible_value_is_refused_by_the_name_of_its_flag(flag: str, line: str) -> None:
    """It is refused before the model is loaded."""
    with pytest.raises(UsageError) as refused:
        sample_options(["run", flag])
    assert str(refused.value) == f"{line} (--help shows the options)"


def test_a_directory_that_is_no_run_is_one_clear_line(sampled: dict[str, jobs.Ended]) -> None:
    ended = sampled["no run"]
    assert (ended.code, ended.stdout) == (65, "")
    assert re.fullmatch(r"distgpt: error: .* holds no checkpoint: train one with .*\n", ended.stderr)


@pytest.fixture(scope="module")
def evaluated(whole: Callable[[str], Trained], tmp_path_factory: pytest.TempPathFactory) -> dict[str, jobs.Ended]:
    """The results of `python -m distgpt.evaluate`, on the data of the run and on data with another tokenizer."""
    run = whole("fsdp").run
    root = tmp_path_factory.mktemp("evaluate")
    (root / "text.txt").write_text("0123456789" * 1000)
    made = jobs.command("prepare", "--input", root / "text.txt", "--output", root / "other", "--tokenizer", "char")
    assert made.code == 0, made
    return jobs.run_all(
        {
            "same windows": lambda: jobs.command("evaluate", run, "--sequences=30"),
            "other tokenizer": lambda: jobs.command("evaluate", run, f"--data={root / 'other'}"),
        }
    )


def test_evaluate_finds_the_loss_that_the_run_logged(
    evaluated: dict[str, jobs.Ended], whole: Callable[[str], Trained]
) -> None:
    line = evaluated["same windows"].stdout
    assert evaluated["same windows"].stderr == ""
    found = re.fullmatch(
        r"step 60 \| val loss (\d\.\d{4}) \| \d\.\d{3} bits/byte \| 30 windows of 16 tokens .*\n", line
    )
    assert found, evaluated["same windows"]
    assert float(found[1]) == pytest.approx(jobs.val_losses(whole("fsdp").run)[60], abs=1e-4)


def test_evaluate_refuses_another_tokenizer(evaluated: dict[str, jobs.Ended]) -> None:
    ended = evaluated["other tokenizer"]
    assert (ended.code, ended.stdout) == (65, "")
    assert re.fullmatch(r"distgpt: error: .* was prepared with another tokenizer than .*\n", ended.stderr)


def test_a_run_is_evaluated_and_replayed_from_another_directory(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").symlink_to(prepared)
    train = [sys.executable, "-m", "distgpt.train", *tiny(Path("data"), Path("run")), "--train.steps=1"]
    trained = jobs.run(["env", "-C", str(tmp_path), *train])
    assert trained.code == 0, trained
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate.main(argparse.Namespace(run="../run", checkpoint="newest", data=None, sequences=5))
    assert f"5 windows of 16 tokens from {tmp_path / 'data'}" in capsys.readouterr().out
    for step in (1, 2):  # from the initial weights, and from the checkpoint
        start = replay.start_before(RunPaths(Path("../run")), step)
        assert replay.open_data(start, None).path == tmp_path / "data"


def test_each_new_best_is_saved_and_can_be_chosen(prepared: Path, tmp_path: Path) -> None:
    """Most evaluations are at steps where no save is due otherwise."""
    ended = jobs.train(1, *tiny(prepared, tmp_path), "--checkpoint.every=15", "--checkpoint.keep=9")
    assert [line.endswith(" | best") for line in ended.stdout.splitlines() if " | val loss " in line] == [True] * 3
    assert jobs.checkpoints(tmp_path) == [f"step-{step:08d}" for step in (15, 20, 30, 40, 45, 60)]
    ended = jobs.command("evaluate", tmp_path, "--sequences=30", "--checkpoint=40")
    assert ended.stdout.startswith(f"step 40 | val loss {jobs.val_losses(tmp_path)[40]:.4f} | "), ended
    ended = jobs.command("sample", tmp_path / "checkpoints" / "step-00000020", "--tokens=1")
    assert (ended.code, ended.stderr) == (0, ""), ended
