"""The use of commands: --help in any terminal, hints after a typing error, completion, and the command `distgpt`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distgpt import completion
from distgpt.cli import COMMANDS, export_options, sample_options
from distgpt.errors import UsageError, did_you_mean, did_you_mean_path
from distgpt.usage import config_help, wrapped
from tests import jobs

SCRIPT_TEST = {
    "bash": """
complete() { :; }
eval "$1"
COMP_WORDBREAKS="=: " COMP_LINE=$2 COMP_POINT=${#2} COMP_CWORD=$3
read -ra COMP_WORDS <<<"$2"
_distgpt
printf '%s\\n' "${COMPREPLY[@]}"
""",
    "zsh": """
compadd() { shift $((${@[(i)--]})); for word; do [[ $word == $typed* ]] && print -- $word; done; true }
compset() { :; }
_files() { :; }
compdef() { :; }
eval "$1"
words=(${=2}) CURRENT=$(($3 + 1)) typed=${2##* }
_distgpt
""",
}


def distgpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m distgpt` with a Python that cannot import torch."""
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('distgpt', run_name='__main__')"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=jobs.environment(**jobs.NOT_FORKED))


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")  # other tests have imported it
@pytest.mark.parametrize("width", [60, 80, 160])
def test_help_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    texts = {name: completion.help_of(name) for name in COMMANDS}
    for name, text in texts.items():
        assert text.startswith(f"usage: python -m distgpt.{name} "), name
        assert max(map(len, text.splitlines())) <= width, name
        assert max(map(len, text.splitlines())) > min(width, 120) // 2, name


def test_help_after_a_preset_shows_its_values() -> None:
    text = " ".join(config_help("distgpt.train", "", files=["gpt2-124m"]).split())
    assert "--model.n_layer=N number of transformer blocks (gpt2-124m: 12)" in text
    assert "(gpt2-124m: 6e-05)" in text
    assert "--train.dtype=auto|float32|bfloat16 " in text
    assert "--checkpoint.every=STEPS|auto " in text
    assert "(default: 600)" in text


def test_help_of_one_section() -> None:
    text = config_help("distgpt.train", "", section="optim")
    assert "--optim.lr=X" in text
    assert "--model" not in text
    with pytest.raises(UsageError, match=r"did you mean optim\?"):
        config_help("distgpt.train", "", section="optimizer")


@pytest.mark.parametrize(
    ("options", "arguments", "hint"),
    [
        (sample_options, ["run", "--promt=x"], "--prompt"),
        (sample_options, ["run", "--temprature", "1"], "--temperature"),
        (export_options, ["run", "out", "--format=transformer"], "transformers"),
    ],
)
def test_an_option_or_value_that_is_mistyped_names_the_nearest(
    options: object, arguments: list[str], hint: str
) -> None:
    assert callable(options)
    with pytest.raises(UsageError) as refused:
        options(arguments)
    assert f"; did you mean {hint}? (--help shows the options)" in str(refused.value)


def test_the_nearest_name_is_meant_if_it_is_near(tmp_path: Path) -> None:
    assert did_you_mean("trian", COMMANDS) == "; did you mean train?"
    assert did_you_mean("qqq", COMMANDS) == ""
    (tmp_path / "quickstart").mkdir()
    assert did_you_mean_path(tmp_path / "quikstart") == f"; did you mean {tmp_path / 'quickstart'}?"
    assert did_you_mean_path(tmp_path / "quickstart") == ""
    assert did_you_mean_path(tmp_path / "there" / "is" / "none") == ""


def test_a_line_is_wrapped_beside_its_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert wrapped("goodput   95.0% of 3m12s: training 3m02s, startup 10s") == (
        "goodput   95.0% of 3m12s: training\n          3m02s, startup 10s"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_commands_presets_keys_and_values_are_completed(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    names = ("train", "sample", "export")
    script = completion.script(shell, {name: completion.words_of(completion.help_of(name)) for name in names})

    def completed(line: str, *, place: int) -> list[str]:
        command = [shell, "-c", SCRIPT_TEST[shell], shell, script, line, str(place)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    typed = "--train.dtype=" if shell == "zsh" else ""
    assert completed("distgpt tr", place=1) == ["train"]
    assert completed("distgpt train gpt2-1", place=2) == ["gpt2-124m", "gpt2-1558m"]
    assert completed("distgpt train --optim.l", place=2) == ["--optim.lr="]
    assert completed("distgpt train --train.dtype=f", place=3 if shell == "bash" else 2) == [f"{typed}float32"]
    assert completed("distgpt train --help=opt", place=2)[0].endswith("optim")
    assert completed("distgpt launch lo", place=2) == ["local"]
    assert completed("distgpt export run out --overw", place=4) == ["--overwrite"]


def test_the_command_lists_the_commands_without_torch() -> None:
    listed = distgpt("--help")
    assert listed.returncode == 0, listed.stderr
    at = [listed.stdout.index(f"\n  {name} ") for name in COMMANDS]
    assert at == sorted(at)
    assert distgpt().stdout == listed.stdout
    assert distgpt("train", "--help=log").stdout.startswith("usage: python -m distgpt.train")
    mistyped = distgpt("smaple")
    assert (mistyped.returncode, mistyped.stdout) == (2, "")
    assert "unknown command smaple; did you mean sample?" in mistyped.stderr


def test_every_command_is_a_module() -> None:
    package = jobs.PROJECT / "distgpt"
    for name in COMMANDS:
        assert (package / f"{name}.py").exists() or (package / name / "__main__.py").exists(), name


@pytest.mark.slow
def test_the_command_trains(tmp_path: Path, prepared: Path) -> None:
    arguments = [
        *jobs.TINY,
        f"--data.path={prepared}",
        f"--run.dir={tmp_path / 'run'}",
        "--train.steps=2",
        "--eval.every=0",
    ]
    trained = jobs.run([sys.executable, "-m", "distgpt", "train", *arguments])
    assert trained.code == 0, trained
    assert "done: step 2" in trained.stdout
    assert os.path.exists(tmp_path / "run" / "metrics.jsonl")
