"""The config tree: who wins, what is refused and how it is said, and what the command line prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distgpt import config
from distgpt.config import resolve, value_at
from distgpt.errors import UsageError


def refusal(*arguments: str, **environment: str) -> str:
    """The one line that these arguments are refused with."""
    with pytest.raises(UsageError) as caught:
        resolve(arguments, environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_win_left_to_right_then_the_environment_then_flags(tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text("[model]\nn_layer = 2\nn_head = 2\nn_embd = 20\n[train]\nsteps = 7\n")
    b.write_text("[model]\nn_head = 4\nn_embd = 40\n[optim]\nlr = 1\n")
    environment = {"DISTGPT_MODEL__N_EMBD": "80", "DISTGPT_LOG__EVERY": "3", "DISTGPT_OTHER": "not a key", "PATH": ""}
    # A flag counts more than a file whatever comes first on the command line.
    found = resolve(["--log.every=5", str(a), str(b)], environment)
    assert found.model.n_layer == 2  # one file
    assert found.model.n_head == 4  # the file further right
    assert found.model.n_embd == 80  # the environment
    assert found.log.every == 5  # the flag
    assert found.optim.lr == 1.0
    assert isinstance(found.optim.lr, float)
    assert found.train.steps == 7
    assert found.model.block_size == config.Config().model.block_size  # the default
    assert resolve([str(b), str(a)], {}).model.n_head == 2
    assert resolve(["seed", str(a)], {}).model.dropout == 0.2
    assert resolve([str(a), "seed"], {}).model.n_head == 6


def test_flags_parse_by_the_type_of_their_key() -> None:
    found = resolve(["--run.fresh", "--train.compile=no", "--train.steps=1e3", "--optim.lr=6e-4", "--run.dir=x=y"], {})
    assert found.run.fresh is True
    assert found.train.compile is False
    assert found.train.steps == 1000
    assert isinstance(found.train.steps, int)
    assert found.optim.lr == 6e-4
    assert found.run.dir == "x=y"
    assert resolve(["--run.seed=9007199254740993"], {}).run.seed == 2**53 + 1
    assert resolve(["--checkpoint.async_save=FALSE"], {}).checkpoint.async_save is False


def test_a_number_may_have_a_word_for_it(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[checkpoint]\nevery = 'auto'\n")
    assert resolve([str(tmp_path / "mine.toml")], {}).checkpoint.every == "auto"
    assert resolve(["--checkpoint.every=auto"], {}).checkpoint.every == "auto"
    found = resolve([str(tmp_path / "mine.toml"), "--checkpoint.every=1e2"], {})
    assert found.checkpoint.every == 100
    assert isinstance(found.checkpoint.every, int)
    (tmp_path / "copy.toml").write_text(config.to_toml(resolve(["--checkpoint.every=auto"], {})))
    assert resolve([str(tmp_path / "copy.toml")], {}).checkpoint.every == "auto"


@pytest.mark.parametrize(
    ("argument", "near"),
    [
        ("--model.nlayer=3", "unknown key model.nlayer: did you mean model.n_layer?"),
        ("--train.batch=3", "unknown key train.batch: did you mean train.micro_batch?"),
        ("--zzz.qqq=3", "unknown key zzz.qqq: --help lists every key"),
        ("--steps=3", "unknown key steps: did you mean train.steps?"),
        ("-x", "unknown key -x"),
        ("gpt2-123m", "no preset is called gpt2-123m: did you mean gpt2-124m?"),
        ("gpt2", "no preset is called gpt2: did you mean gpt2-124m?"),
        ("gpt2-medium", "no preset is called gpt2-medium: did you mean gpt2-350m?"),
        ("GPT-2_XL", "no preset is called GPT-2_XL: did you mean gpt2-1558m?"),
        ("gpt2-1.5b", "no preset is called gpt2-1.5b: did you mean gpt2-1558m?"),
        ("modern-3b", "no preset is called modern-3b: did you mean modern-7b?"),
        ("--lr=3e-4", "unknown key lr: did you mean optim.lr?"),
        ("--lr", "unknown key lr: did you mean optim.lr?"),
        ("--model.lr=1", "unknown key model.lr: did you mean optim.lr?"),
        ("--optim.learning_rate=1", "unknown key optim.learning_rate: did you mean optim.lr?"),
        ("--batch-size=8", "unknown key batch-size: did you mean train.global_batch?"),
        ("--max_iters=8", "unknown key max_iters: did you mean train.steps?"),
        ("--nlayer=8", "unknown key nlayer: did you mean model.n_layer?"),
        ("--every=8", "unknown key every: did you mean eval.every or checkpoint.every or log.every?"),
    ],
)
def test_an_unknown_key_or_preset_names_the_nearest(argument: str, near: str) -> None:
    assert refusal(argument).startswith(near)


def test_an_unknown_key_says_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlearning_rate = 1\n")
    assert f"(in {file})" in refusal(str(file))
    assert "(in DISTGPT_OPTIM__BETA3)" in refusal(DISTGPT_OPTIM__BETA3="1")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--train.steps=many", "train.steps is 'many': it must be a whole number"),
        ("--train.steps=1.5", "train.steps is '1.5': it must be a whole number"),
        ("--train.steps=", "train.steps is '': it must be a whole number"),
        ("--train.steps=nan", "train.steps is 'nan': it must be a whole number"),
        ("--optim.lr=fast", "optim.lr is 'fast': it must be a number"),
        ("--optim.lr=inf", "optim.lr is 'inf': it must be a number"),
        ("--train.compile=maybe", "train.compile is 'maybe': it must be true or false"),
        ("--train.dtype=float8", "train.dtype is 'float8': it must be one of auto, float32, bfloat16"),
        ("--checkpoint.every=often", "checkpoint.every is 'often': it must be a whole number or auto"),
        ("--checkpoint.every=1.5", "checkpoint.every is '1.5': it must be a whole number or auto"),
        ("--health.on_nonfinite=ignore", "health.on_nonfinite is 'ignore': it must be one of stop, skip"),
        ("--parallel.strategy=zero", "parallel.strategy is 'zero': it must be one of auto, ddp, fsdp, hsdp, diloco"),
        ("--train.steps", "--train.steps has no value: write --train.steps=VALUE"),
    ],
)
def test_a_wrong_type_or_choice_says_what_it_must_be(argument: str, expected: str) -> None:
    assert refusal(argument) == expected


def test_an_empty_argument_is_named_as_such() -> None:
    assert refusal("") == "an argument is empty: name a preset or a .toml file, or leave it out"


def test_a_directory_is_no_preset(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == f"{tmp_path} is a directory, no preset: for data write --data.path={tmp_path}"


def test_every_name_that_others_use_stands_for_a_key_or_preset() -> None:
    assert set(config.OTHER_NAMES.values()) <= set(config.keys())
    assert set(config.OTHER_PRESETS.values()) <= set(config.preset_names())


@pytest.mark.parametrize("key", ["model.n_embd", "model.n_layer", "model.block_size", "train.global_batch"])
def test_numbers_beyond_any_model_are_refused_at_once(key: str) -> None:
    """Not after a search for the divisors of each of them."""
    assert refusal(f"--{key}={10**15}", "--train.micro_batch=7") == f"{key} is {10**15}: it can be 16,777,216 at most"


def test_a_value_may_follow_its_key_after_a_space() -> None:
    found = resolve(["--data.path", "books", "seed", "--optim.lr", "1e-3", "--run.fresh", "--train.compile", "no"], {})
    assert (found.data.path, found.optim.lr, found.run.fresh, found.train.compile) == ("books", 1e-3, True, False)
    assert found.model.dropout == 0.2  # seed is a preset, no value of the key before it
    assert resolve(["--run.fresh", "seed"], {}).run.fresh is True
    assert refusal("--model.n_layer", "-1") == "model.n_layer is -1: it must be positive"
    assert refusal("--run.dir", "--run.fresh") == "--run.dir has no value: write --run.dir=VALUE"


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("DISTGPT_OPTIM_LR", "DISTGPT_OPTIM__LR"),
        ("DISTGPT_OPTIM_LEARNING_RATE", "DISTGPT_OPTIM__LR"),
        ("DISTGPT_MODEL_N_LAYER", "DISTGPT_MODEL__N_LAYER"),
        ("DISTGPT_STEPS", "DISTGPT_TRAIN__STEPS"),
    ],
)
def test_a_variable_with_one_underscore_is_not_ignored(name: str, right: str) -> None:
    assert refusal(**{name: "1"}) == f"{name} sets no key: did you mean {right}?"


def test_variables_of_the_launchers_are_no_keys() -> None:
    for name in ("ENV", "EXIT_FILE", "HOME", "PREFLIGHT", "RUN", "SWEEP", "TORCH"):
        assert resolve([], {f"DISTGPT_{name}": "1"}) == config.Config()


def test_a_tilde_is_expanded_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text("[run]\ndir = '~/run'\n[data]\npath = '~/data'\n")
    for found in (
        resolve(["--run.dir=~/run", "--data.path=~/data"], {}),
        resolve(["~/mine.toml"], {}),
        resolve([], {"DISTGPT_RUN__DIR": "~/run", "DISTGPT_DATA__PATH": "~/data"}),
    ):
        assert (found.run_dir, found.data.path) == (tmp_path / "run", str(tmp_path / "data"))
    assert resolve(["--run.dir=./~/run"], {}).run.dir == "./~/run"


def test_a_dollar_in_a_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[data]\npath = '$HOME/data'\n")
    says = "{}: '$HOME/{}' holds a $, and variables are not expanded here: write the path itself"
    assert refusal("--run.dir=$HOME/run") == says.format("run.dir", "run")
    assert refusal(str(tmp_path / "mine.toml")) == says.format("data.path", "data")
    assert refusal(DISTGPT_RUN__DIR="$HOME/run") == says.format("run.dir", "run")
    assert refusal("--run.dir=~nobody-here/run").startswith("run.dir: no home directory is known for ~nobody-here/run")
    (tmp_path / "a$b").mkdir()
    assert resolve([f"--data.path={tmp_path / 'a$b'}"], {}).data.path == str(tmp_path / "a$b")


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[train]\nsteps = 'x'", "train.steps is 'x' (in {}): it must be a whole number"),
        ("[train]\nsteps = true", "train.steps is True (in {}): it must be a whole number"),
        ("[train]\nsteps = [1]", "train.steps is [1] (in {}): it must be a whole number"),
        ("[checkpoint]\nevery = [1]", "checkpoint.every is [1] (in {}): it must be a whole number or auto"),
        ("[train]\ncompile = 1", "train.compile is 1 (in {}): it must be true or false"),
        ("[data]\npath = 3", "data.path is 3 (in {}): it must be a text"),
        ("steps = 3", "{}: steps must be a table of keys, like [model]"),
        ("[train\n", "cannot read {}: "),
    ],
)
def test_a_wrong_type_in_a_file_names_the_file(tmp_path: Path, toml: str, expected: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(toml)
    assert refusal(str(file)).startswith(expected.format(file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "none.toml")).startswith(f"cannot read {tmp_path / 'none.toml'}: ")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    assert refusal(str(tmp_path / "latin.toml")).startswith(f"cannot read {tmp_path / 'latin.toml'}: ")


@pytest.mark.parametrize("key", config.POSITIVE)
def test_what_must_be_positive_is(key: str) -> None:
    assert f"{key} is 0" in refusal(f"--{key}=0")
    assert f"{key} is -1" in refusal(f"--{key}=-1")


@pytest.mark.parametrize("key", config.NOT_NEGATIVE)
def test_what_may_be_zero_is_not_negative(key: str) -> None:
    assert f"{key} is -1" in refusal(f"--{key}=-1")
    assert value_at(resolve([f"--{key}=0"], {}), key) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--model.n_head=5"],
            "model.n_head is 5, which does not divide model.n_embd = 384: take 2 or 3 or 4 or 6 heads",
        ),
        (
            ["--parallel.strategy=diloco", "--train.steps=100", "--eval.every=120"],
            "eval.every is 120, which is no multiple of parallel.outer_every = 50: take 100 or 150",
        ),
        (
            ["--parallel.strategy=diloco", "--train.steps=30", "--eval.every=0"],
            "train.steps is 30, which is no multiple of parallel.outer_every = 50: take 50",
        ),
        (
            ["--model.n_kv_head=4"],
            "model.n_kv_head is 4, which does not divide model.n_head = 6: take 1 or 2 or 3 or 6",
        ),
        (
            ["--model.position=rope", "--model.n_embd=18"],
            "rope turns pairs of values, but n_embd / n_head = 3 is odd",
        ),
        (["--model.dropout=1"], "model.dropout is 1.0: it must be at least 0 and below 1"),
        (["--model.dropout=-0.1"], "model.dropout is -0.1: it must be at least 0 and below 1"),
        (["--optim.decay_fraction=0"], "optim.decay_fraction is 0.0: 0 < it <= 1"),
        (["--optim.decay_fraction=1.5"], "optim.decay_fraction is 1.5: 0 < it <= 1"),
        (["--optim.min_lr=1"], "optim.min_lr is 1.0, above optim.lr = 0.0003"),
        (["--run.seed=4611686018427387904"], "run.seed is 4611686018427387904: it must lie between -2^62 and 2^62"),
        (["--optim.beta1=1"], "optim.beta1 is 1.0: 0 <= it < 1"),
        (["--optim.beta2=-0.5"], "optim.beta2 is -0.5: 0 <= it < 1"),
        (
            ["--train.global_batch=20", "--train.micro_batch=3"],
            "train.micro_batch is 3, which does not divide train.global_batch = 20: take 1 or 2 or 4 or 5",
        ),
    ],
)
def test_values_that_cannot_work_together_say_which_would(arguments: list[str], expected: str) -> None:
    assert refusal(*arguments) == expected


@pytest.mark.parametrize("preset", config.preset_names())
def test_toml_of_a_config_is_that_config(preset: str, tmp_path: Path) -> None:
    found = resolve([preset, '--run.dir=runs/ä "b"', "--optim.lr=1e-2"], {})
    (tmp_path / "copy.toml").write_text(config.to_toml(found), encoding="utf-8")
    assert resolve([str(tmp_path / "copy.toml")], {}) == found
    assert config.from_dict(config.to_dict(found), source="here") == found


def test_run_dir_is_named_after_the_data() -> None:
    assert resolve(["--data.path=some/where/mine/"], {}).run_dir == Path("runs/mine")
    assert resolve(["--data.path=.", "--run.dir=out"], {}).run_dir == Path("out")


DOOR_WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["train", *sys.argv[1:]]
try:
    runpy.run_module("distgpt.train", run_name="__main__")
finally:
    assert "torch" not in sys.modules, "torch was imported"
    assert "numpy" not in sys.modules, "numpy was imported"
"""


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """distgpt.train, failing if it gets as far as torch."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTGPT_")}
    command = [sys.executable, "-c", DOOR_WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_help_lists_every_key_and_preset_without_torch() -> None:
    done = command_line("--help")
    assert done.returncode == 0, done.stderr
    known = config.keys()
    assert [key for key in known if f"  --{key} " not in done.stdout] == []
    for preset in config.preset_names():
        assert preset in done.stdout
    defaults = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(defaults) == len(known)
    assert [line for line in defaults if "(default: " not in line] == []
    assert max(map(len, done.stdout.splitlines())) <= 170


def test_print_config_round_trips_through_a_file(tmp_path: Path) -> None:
    first = command_line("seed", "--model.n_layer=3", "--print-config")
    assert first.returncode == 0, first.stderr
    file = tmp_path / "printed.toml"
    file.write_text(first.stdout)
    assert command_line("--print-config", str(file)).stdout == first.stdout
    assert resolve([str(file)], {}) == resolve(["seed", "--model.n_layer=3"], {})


def test_a_mistyped_key_is_one_line_and_exit_code_2_without_torch() -> None:
    done = command_line("--model.nlayer=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "distgpt: error: unknown key model.nlayer: did you mean model.n_layer?\n"
