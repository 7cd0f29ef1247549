"""The config: precedence, error messages for wrong values, and the output of the command line."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distgpt import config
from distgpt.config import resolve, value_at
from distgpt.errors import UsageError


def error_of(*arguments: str, **environment: str) -> str:
    """Resolve wrong arguments; return the error, which must be one line."""
    with pytest.raises(UsageError) as caught:
        resolve(arguments, environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_override_left_to_right_then_the_environment_then_flags(tmp_path: Path) -> None:
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    a.write_text("[model]\nn_layer = 2\nn_head = 2\nn_embd = 20\n[train]\nsteps = 7\n")
    b.write_text("[model]\nn_head = 4\nn_embd = 40\n[optim]\nlr = 1\n")
    environment = {"DISTGPT_MODEL__N_EMBD": "80", "DISTGPT_LOG__EVERY": "3", "DISTGPT_OTHER": "not a key", "PATH": ""}
    # A flag overrides a file, also if the flag comes first.
    resolved = resolve(["--log.every=5", str(a), str(b)], environment)
    assert resolved.model.n_layer == 2  # from a.toml
    assert resolved.model.n_head == 4  # b.toml, which comes later, overrides a.toml
    assert resolved.model.n_embd == 80  # the environment
    assert resolved.log.every == 5  # the flag
    assert resolved.optim.lr == 1.0
    assert isinstance(resolved.optim.lr, float)
    assert resolved.train.steps == 7
    assert resolved.model.block_size == config.Config().model.block_size  # the default
    assert resolve([str(b), str(a)], {}).model.n_head == 2
    assert resolve(["seed", str(a)], {}).model.dropout == 0.2
    assert resolve([str(a), "seed"], {}).model.n_head == 6


def test_flags_are_parsed_by_the_type_of_their_key() -> None:
    resolved = resolve(
        ["--run.fresh", "--train.compile=no", "--train.steps=1e3", "--optim.lr=6e-4", "--run.dir=x=y"], {}
    )
    assert resolved.run.fresh is True
    assert resolved.train.compile is False
    assert resolved.train.steps == 1000
    assert isinstance(resolved.train.steps, int)
    assert resolved.optim.lr == 6e-4
    assert resolved.run.dir == "x=y"
    assert resolve(["--run.seed=9007199254740993"], {}).run.seed == 2**53 + 1
    assert resolve(["--checkpoint.async_save=FALSE"], {}).checkpoint.async_save is False


def test_a_number_or_a_certain_word_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[checkpoint]\nevery = 'auto'\n")
    assert resolve([str(tmp_path / "mine.toml")], {}).checkpoint.every == "auto"
    assert resolve(["--checkpoint.every=auto"], {}).checkpoint.every == "auto"
    resolved = resolve([str(tmp_path / "mine.toml"), "--checkpoint.every=1e2"], {})
    assert resolved.checkpoint.every == 100
    assert isinstance(resolved.checkpoint.every, int)
    (tmp_path / "copy.toml").write_text(config.to_toml(resolve(["--checkpoint.every=auto"], {})))
    assert resolve([str(tmp_path / "copy.toml")], {}).checkpoint.every == "auto"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--model.nlayer=3", "unknown key model.nlayer: did you mean model.n_layer?"),
        ("--train.batch=3", "unknown key train.batch: did you mean train.micro_batch?"),
        ("--zzz.qqq=3", "unknown key zzz.qqq: --help lists every key"),
        ("--steps=3", "unknown key steps: did you mean train.steps?"),
        ("-x", "unknown key -x"),
        ("gpt2-123m", "unknown preset gpt2-123m: did you mean gpt2-124m?"),
        ("gpt2", "unknown preset gpt2: did you mean gpt2-124m?"),
        ("gpt2-medium", "unknown preset gpt2-medium: did you mean gpt2-350m?"),
        ("GPT-2_XL", "unknown preset GPT-2_XL: did you mean gpt2-1558m?"),
        ("gpt2-1.5b", "unknown preset gpt2-1.5b: did you mean gpt2-1558m?"),
        ("modern-3b", "unknown preset modern-3b: did you mean modern-7b?"),
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
def test_an_unknown_key_or_preset_names_the_nearest(argument: str, expected: str) -> None:
    assert error_of(argument).startswith(expected)


def test_the_error_for_an_unknown_key_names_its_source(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlearning_rate = 1\n")
    assert f"(in {file})" in error_of(str(file))
    assert "(in DISTGPT_OPTIM__BETA3)" in error_of(DISTGPT_OPTIM__BETA3="1")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--train.steps=many", "train.steps is 'many': it must be a whole number"),
        ("--train.steps=1.5", "train.steps is '1.5': it must be a whole number"),
        ("--train.steps=", "train.steps is '': it must be a whole number"),
        ("--train.steps=nan", "train.steps is 'nan': it must be a whole number"),
        ("--optim.lr=fast", "optim.lr is 'fast': it must be a number"),
        ("--optim.lr=inf", "optim.lr is 'inf': it must be a number"),
        ("--train.compile=maybe", "train.compile is 'maybe': it must be true or false or auto"),
        (
            "--train.dtype=float8",
            "train.dtype is 'float8': it must be one of auto, float32, bfloat16; did you mean float32?",
        ),
        (
            "--train.dtype=bf16",
            "train.dtype is 'bf16': it must be one of auto, float32, bfloat16; did you mean bfloat16?",
        ),
        (
            "--checkpoint.every=atuo",
            "checkpoint.every is 'atuo': it must be a whole number or auto; did you mean auto?",
        ),
        ("--checkpoint.every=often", "checkpoint.every is 'often': it must be a whole number or auto"),
        ("--checkpoint.every=1.5", "checkpoint.every is '1.5': it must be a whole number or auto"),
        ("--health.on_nonfinite=ignore", "health.on_nonfinite is 'ignore': it must be one of stop, skip"),
        ("--parallel.strategy=zero", "parallel.strategy is 'zero': it must be one of auto, ddp, fsdp, hsdp, diloco"),
        ("--train.steps", "--train.steps has no value: write --train.steps=VALUE"),
    ],
)
def test_the_error_for_a_wrong_value_names_the_right_ones(argument: str, expected: str) -> None:
    assert error_of(argument) == expected


def test_an_empty_argument_is_an_error() -> None:
    assert error_of("") == "an argument is empty: give a preset or a .toml file, or remove it"


def test_a_directory_is_not_a_preset(tmp_path: Path) -> None:
    expected = f"{tmp_path} is a directory, not a preset: to train on its data, write --data.path={tmp_path}"
    assert error_of(str(tmp_path)) == expected


def test_suggested_keys_and_presets_exist() -> None:
    assert set(config.SUGGESTED_KEYS.values()) <= set(config.keys())
    assert set(config.SUGGESTED_PRESETS.values()) <= set(config.preset_names())


@pytest.mark.parametrize("key", ["model.n_embd", "model.n_layer", "model.block_size", "train.global_batch"])
def test_huge_numbers_are_refused_at_once(key: str) -> None:
    """The limit is checked before the search for divisors, which would take too long."""
    assert error_of(f"--{key}={10**15}", "--train.micro_batch=7") == f"{key} is {10**15}: it must be at most 16,777,216"


def test_a_value_may_follow_its_key_after_a_space() -> None:
    resolved = resolve(
        ["--data.path", "books", "seed", "--optim.lr", "1e-3", "--run.fresh", "--train.compile", "no"], {}
    )
    assert (resolved.data.path, resolved.optim.lr, resolved.run.fresh, resolved.train.compile) == (
        "books",
        1e-3,
        True,
        False,
    )
    assert resolved.model.dropout == 0.2  # seed is a preset, not the value of the key before it
    assert resolve(["--run.fresh", "seed"], {}).run.fresh is True
    assert error_of("--model.n_layer", "-1") == "model.n_layer is -1: it must be positive"
    assert error_of("--run.dir", "--run.fresh") == "--run.dir has no value: write --run.dir=VALUE"


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("DISTGPT_OPTIM_LR", "DISTGPT_OPTIM__LR"),
        ("DISTGPT_OPTIM_LEARNING_RATE", "DISTGPT_OPTIM__LR"),
        ("DISTGPT_MODEL_N_LAYER", "DISTGPT_MODEL__N_LAYER"),
        ("DISTGPT_STEPS", "DISTGPT_TRAIN__STEPS"),
    ],
)
def test_a_variable_with_a_single_underscore_is_an_error(name: str, suggested: str) -> None:
    assert error_of(**{name: "1"}) == f"unknown variable {name}: did you mean {suggested}?"


def test_variables_of_the_launchers_are_ignored() -> None:
    for name in ("ENV", "EXIT_FILE", "HOME", "PREFLIGHT", "RUN", "SWEEP", "TORCH"):
        assert resolve([], {f"DISTGPT_{name}": "1"}) == config.Config()


def test_a_tilde_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text("[run]\ndir = '~/run'\n[data]\npath = '~/data'\n")
    for resolved in (
        resolve(["--run.dir=~/run", "--data.path=~/data"], {}),
        resolve(["~/mine.toml"], {}),
        resolve([], {"DISTGPT_RUN__DIR": "~/run", "DISTGPT_DATA__PATH": "~/data"}),
    ):
        assert (resolved.run_dir, resolved.data.path) == (tmp_path / "run", str(tmp_path / "data"))
    assert resolve(["--run.dir=./~/run"], {}).run.dir == "./~/run"
    assert resolve(["--data.path=~/a:7,~/b:3"], {}).data.path == f"{tmp_path}/a:7,{tmp_path}/b:3"


@pytest.mark.parametrize(
    ("data_path", "expected"),
    [
        ("data/a", [("data/a", 1.0)]),
        ("data/a:0.5", [("data/a:0.5", 1.0)]),  # one directory, whatever its name
        ("data/a,b", [("data/a,b", 1.0)]),
        ("data/a:1,data/b", [("data/a:1,data/b", 1.0)]),
        ("data/a:3,data/b:1", [("data/a", 0.75), ("data/b", 0.25)]),
        ("x:1:.5,y:1.,z:0.5", [("x:1", 0.25), ("y", 0.5), ("z", 0.25)]),
    ],
)
def test_data_path_names_one_directory_or_a_mix(data_path: str, expected: list[tuple[str, float]]) -> None:
    assert config.shares_of(data_path) == expected


def test_a_dollar_in_a_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[data]\npath = '$HOME/data'\n")
    expected = "{}: '$HOME/{}' holds a $, and variables are not expanded here: write the path itself"
    assert error_of("--run.dir=$HOME/run") == expected.format("run.dir", "run")
    assert error_of(str(tmp_path / "mine.toml")) == expected.format("data.path", "data")
    assert error_of(DISTGPT_RUN__DIR="$HOME/run") == expected.format("run.dir", "run")
    assert error_of("--run.dir=~nobody-here/run").startswith("run.dir: no home directory is known for ~nobody-here/run")
    (tmp_path / "a$b").mkdir()
    assert resolve([f"--data.path={tmp_path / 'a$b'}"], {}).data.path == str(tmp_path / "a$b")


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[train]\nsteps = 'x'", "train.steps is 'x' (in {}): it must be a whole number"),
        ("[train]\nsteps = true", "train.steps is True (in {}): it must be a whole number"),
        ("[train]\nsteps = [1]", "train.steps is [1] (in {}): it must be a whole number"),
        ("[checkpoint]\nevery = [1]", "checkpoint.every is [1] (in {}): it must be a whole number or auto"),
        ("[train]\ncompile = 1", "train.compile is 1 (in {}): it must be true or false or auto"),
        ("[data]\npath = 3", "data.path is 3 (in {}): it must be a string"),
        ("steps = 3", "{}: steps must be a table of keys, like [model]"),
        ("[train\n", "cannot read {}: "),
    ],
)
def test_the_error_for_a_wrong_type_in_a_file_names_the_file(tmp_path: Path, toml: str, expected: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(toml)
    assert error_of(str(file)).startswith(expected.format(file))


def test_the_error_for_an_unreadable_file_names_it(tmp_path: Path) -> None:
    assert error_of(str(tmp_path / "none.toml")).startswith(f"cannot read {tmp_path / 'none.toml'}: ")
    (tmp_path / "latin.toml").write_bytes(b"# \xe9\n")
    assert error_of(str(tmp_path / "latin.toml")).startswith(f"cannot read {tmp_path / 'latin.toml'}: ")


@pytest.mark.parametrize("key", config.POSITIVE)
def test_zero_and_negative_values_are_refused(key: str) -> None:
    assert f"{key} is 0" in error_of(f"--{key}=0")
    assert f"{key} is -1" in error_of(f"--{key}=-1")


@pytest.mark.parametrize("key", config.NOT_NEGATIVE)
def test_negative_values_are_refused_and_zero_is_not(key: str) -> None:
    assert f"{key} is -1" in error_of(f"--{key}=-1")
    assert value_at(resolve([f"--{key}=0"], {}), key) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--model.n_head=5"],
            "model.n_head is 5, which does not divide model.n_embd = 384: take 2 or 3 or 4 or 6",
        ),
        (
            ["--parallel.strategy=diloco", "--train.steps=100", "--eval.every=120"],
            "eval.every is 120, which is not a multiple of parallel.outer_every = 50: take 100 or 150",
        ),
        (
            ["--parallel.strategy=diloco", "--train.steps=30", "--eval.every=0"],
            "train.steps is 30, which is not a multiple of parallel.outer_every = 50: take 50",
        ),
        (
            ["--model.n_kv_head=4"],
            "model.n_kv_head is 4, which does not divide model.n_head = 6: take 1 or 2 or 3 or 6",
        ),
        (
            ["--model.position=rope", "--model.n_embd=18"],
            "rope needs an even head size, but it is 3",
        ),
        (["--model.dropout=1"], "model.dropout is 1.0: it must be at least 0 and below 1"),
        (["--model.dropout=-0.1"], "model.dropout is -0.1: it must be at least 0 and below 1"),
        (["--optim.decay_fraction=0"], "optim.decay_fraction is 0.0: it must be above 0 and at most 1"),
        (["--optim.decay_fraction=1.5"], "optim.decay_fraction is 1.5: it must be above 0 and at most 1"),
        (["--optim.min_lr=1"], "optim.min_lr is 1.0: it must be at most optim.lr = 0.0003"),
        (["--run.seed=4611686018427387904"], "run.seed is 4611686018427387904: it must be between -2^62 and 2^62"),
        (["--optim.beta1=1"], "optim.beta1 is 1.0: it must be at least 0 and below 1"),
        (["--optim.beta2=-0.5"], "optim.beta2 is -0.5: it must be at least 0 and below 1"),
        (
            ["--train.global_batch=20", "--train.micro_batch=3"],
            "train.micro_batch is 3, which does not divide train.global_batch = 20: take 1 or 2 or 4 or 5",
        ),
    ],
)
def test_the_error_for_incompatible_values_suggests_others(arguments: list[str], expected: str) -> None:
    assert error_of(*arguments) == expected


@pytest.mark.parametrize("preset", config.preset_names())
def test_to_toml_can_be_read_back(preset: str, tmp_path: Path) -> None:
    resolved = resolve([preset, '--run.dir=runs/ä "b"', "--optim.lr=1e-2"], {})
    (tmp_path / "copy.toml").write_text(config.to_toml(resolved), encoding="utf-8")
    assert resolve([str(tmp_path / "copy.toml")], {}) == resolved
    assert config.from_dict(config.to_dict(resolved), source="here") == resolved


def test_the_default_run_dir_has_the_name_of_the_data() -> None:
    assert resolve(["--data.path=some/where/mine/"], {}).run_dir == Path("runs/mine")
    assert resolve(["--data.path=.", "--run.dir=out"], {}).run_dir == Path("out")
    assert resolve(["--data.path=some/a:0.7,b:0.3"], {}).run_dir == Path("runs/a+b")


COMMAND_WITHOUT_TORCH = """
import runpy, sys
sys.argv = ["train", *sys.argv[1:]]
try:
    runpy.run_module("distgpt.train", run_name="__main__")
finally:
    assert "torch" not in sys.modules, "torch was imported"
    assert "numpy" not in sys.modules, "numpy was imported"
"""


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run distgpt.train; fail if it imports torch or numpy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTGPT_")}
    command = [sys.executable, "-c", COMMAND_WITHOUT_TORCH, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


def test_help_lists_every_key_and_preset_without_torch() -> None:
    done = command_line("--help")
    assert done.returncode == 0, done.stderr
    known = config.keys()
    assert [key for key in known if f"  --{key}=" not in done.stdout] == []
    for preset in config.preset_names():
        assert preset in done.stdout
    assert done.stdout.count("(default: ") == len(known)
    assert max(map(len, done.stdout.splitlines())) <= 80  # there is no terminal


def test_the_printed_config_can_be_read_from_a_file(tmp_path: Path) -> None:
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


def test_the_model_of_the_weights_takes_the_place_of_the_defaults_without_torch(tmp_path: Path) -> None:
    """A preset, a variable or a flag wins over it."""
    sizes = {"n_layer": 5, "n_head": 2, "n_embd": 24, "n_positions": 64, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    done = command_line(f"--init.from={tmp_path}", "--model.block_size=8", "--print-config")
    assert done.returncode == 0, done.stderr
    printed = tomllib.loads(done.stdout)
    assert printed["init"] == {"from": str(tmp_path)}
    found = {key: printed["model"][key] for key in ("n_layer", "n_head", "n_embd", "block_size", "mlp", "tied_head")}
    assert found == {"n_layer": 5, "n_head": 2, "n_embd": 24, "block_size": 8, "mlp": "gelu", "tied_head": True}
