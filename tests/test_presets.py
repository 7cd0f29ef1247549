"""The presets: all are valid and have the sizes that their comments state."""

import re
import sys
from pathlib import Path

import pytest

from distgpt.config import PACKAGE, preset_names, resolve
from distgpt.model.gpt import count_parameters
from tests import jobs

# Published parameters of GPT-2 at vocabulary 50,257 without padding (Radford et al. 2019, and the released weights).
GPT2_PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1558m": 1_557_611_200,
}
NOMINAL_SIZES = {"modern-125m": 125e6, "modern-1b": 1e9, "modern-7b": 7e9}


def text_of(name: str) -> str:
    return (PACKAGE / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_all_presets_are_packaged() -> None:
    assert {"seed", *GPT2_PARAMETERS, *NOMINAL_SIZES} <= set(preset_names())


def test_presets_are_found_from_the_directory_above_a_clone(tmp_path: Path) -> None:
    """There Python takes the folder of the clone for a namespace package `distgpt`."""
    (tmp_path / "distgpt").mkdir()
    for option in ("--print-config", "--help"):
        command = [sys.executable, "-m", "distgpt.train", "quickstart", option]
        done = jobs.run(["bash", "-c", 'cd "$0" && exec "$@"', str(tmp_path), *command])
        assert (done.code, done.stderr) == (0, "")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_valid(name: str) -> None:
    resolve([name], {})


@pytest.mark.parametrize("name", ["seed", "shakespeare", *GPT2_PARAMETERS, *NOMINAL_SIZES])
def test_a_preset_states_its_size(name: str) -> None:
    model = resolve([name], {}).model
    stated = re.search(r"([\d,]+) parameters at vocabulary ([\d,]+)(?:, ([\d,]+) of them padding)?\.", text_of(name))
    assert stated is not None
    vocab_size = number(stated[2])
    assert count_parameters(model, vocab_size) == number(stated[1])
    tables = 1 if model.tied_head else 2
    padding = -vocab_size % model.vocab_multiple * model.n_embd * tables
    assert padding == number(stated[3] or "0")


@pytest.mark.parametrize(("name", "parameters"), GPT2_PARAMETERS.items())
def test_gpt2_presets_have_the_published_sizes(name: str, parameters: int) -> None:
    model = resolve([name, "--model.vocab_multiple=1"], {}).model
    assert count_parameters(model, 50_257) == parameters


@pytest.mark.parametrize(("name", "nominal"), NOMINAL_SIZES.items())
def test_modern_presets_have_about_the_size_in_their_name(name: str, nominal: float) -> None:
    assert count_parameters(resolve([name], {}).model, 50_257) == pytest.approx(nominal, rel=0.02)
