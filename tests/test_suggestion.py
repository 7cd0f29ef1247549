"""The suggested commands, in prepare's last line and in the README, suit the text and the machine."""

import re
import shlex
from pathlib import Path

import pytest

from distgpt import machine, suggestion
from distgpt.config import Config, resolve
from distgpt.model.gpt import count_parameters
from distgpt.suggestion import training_command, wrapped_command
from tests import jobs


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine, "available_cpus", lambda: 16)


def config_of(command: str) -> Config:
    return resolve(shlex.split(command.partition("-m distgpt.train ")[2]), {})


def test_on_cpus_the_quickstart_preset_is_suggested(cpus: None) -> None:
    command = training_command(Path("data/my books"), train_tokens=90_000_000, max_window=9_000_000)
    assert command == (
        "torchrun --standalone --nproc_per_node=2 -m distgpt.train quickstart "
        "'--data.path=data/my books' '--run.dir=runs/my books'"
    )
    assert config_of(command).train == resolve(["quickstart"], {}).train


def test_the_quickstart_data_needs_no_flags(cpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_cpus", lambda: 1)
    command = training_command(Path("data/stdlib"), train_tokens=9_000_000, max_window=900_000)
    assert command == "python -m distgpt.train quickstart"


@pytest.mark.parametrize(
    ("tokens", "preset"),
    [(1_000_000, "quickstart"), (30_000_000, "seed"), (10**9, "modern-125m"), (10**12, "modern-125m")],
)
def test_on_gpus_a_preset_that_suits_the_text_is_suggested(gpus: None, tokens: int, preset: str) -> None:
    command = training_command(Path("data/mine"), train_tokens=tokens, max_window=tokens // 10)
    config = config_of(command)
    assert config.model == resolve([preset], {}).model
    ranks = re.search("nproc_per_node=([0-9]+)", command)
    assert ranks is not None
    assert config.train.global_batch % int(ranks[1]) == 0
    assert int(ranks[1]) in (3, 4)


@pytest.mark.parametrize("tokens", [300_000, 2_000_000, 25_000_000, 300_000_000, 10**10])
def test_the_text_is_used_ten_times_at_most(gpus: None, tokens: int) -> None:
    config = config_of(training_command(Path("data/mine"), train_tokens=tokens, max_window=tokens // 10))
    used = config.train.steps * config.train.global_batch * config.model.block_size
    assert used <= suggestion.MANY_EPOCHS * tokens
    assert config.optim.warmup_steps < config.train.steps


def test_short_shards_get_a_smaller_block_size(cpus: None) -> None:
    config = config_of(training_command(Path("data/mine"), train_tokens=900, max_window=100))
    assert (config.model.block_size, config.train.steps) == (64, suggestion.MIN_STEPS)


def test_the_example_of_the_readme_takes_less_than_an_hour() -> None:
    section = (jobs.PROJECT / "README.md").read_text().partition("## Your own text")[2].partition("\n## ")[0]
    (command,) = re.findall(r"^.*-m distgpt\.train (?!--help).*--data\.path=data/mine.*$", section, re.MULTILINE)
    config = config_of(command.partition("#")[0])
    tokens = config.train.steps * config.train.global_batch * config.model.block_size
    operations = 6 * count_parameters(config.model, 8192) * tokens
    assert operations / 20e9 < 3600, "an hour on a CPU with 20 GFLOP/s"


def test_a_command_is_broken_at_its_options_alone() -> None:
    command = shlex.join(["python", "-m", "distgpt.train", "seed", f"--data.path={'my text ' * 8}", "--train.steps=20"])
    wrapped = wrapped_command(command, indent=4)
    assert [line[:10] for line in wrapped.splitlines()] == ["python -m ", "    '--dat", "    --trai"]
    assert shlex.split(wrapped.replace("\\\n", "")) == shlex.split(command)
