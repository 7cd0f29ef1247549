"""Paths that a user types: every option that takes a path expands ~ and refuses a $."""

from collections.abc import Callable
from pathlib import Path

import pytest

from distgpt import cli
from distgpt.errors import UsageError
from distgpt.prepare import parse


def prepare_arguments(*arguments: str) -> list[object]:
    options = parse(arguments)
    return [*(options.input or []), *(options.val_input or []), options.output, options.tokenizer, options.verify]


def of_command(name: str) -> Callable[..., list[object]]:
    parse = cli.COMMANDS[name].options
    assert parse is not None
    return lambda *arguments: list(vars(*parse(arguments)).values())


PATHS: dict[str, tuple[Callable[..., list[object]], list[str]]] = {
    "prepare --input": (prepare_arguments, ["--output", "out", "--input", "-", "{}"]),
    "prepare --val-input": (prepare_arguments, ["--output", "out", "--input", "a", "--val-input", "b", "{}"]),
    "prepare --output": (prepare_arguments, ["--input", "-", "--output", "{}"]),
    "prepare --output=": (prepare_arguments, ["--input", "-", "--output={}"]),
    "prepare --tokenizer": (prepare_arguments, ["--tokenizer", "{}"]),
    "prepare --verify": (prepare_arguments, ["--verify", "{}"]),
    "evaluate RUN": (of_command("evaluate"), ["{}"]),
    "evaluate --data": (of_command("evaluate"), ["run", "--data={}"]),
    "sample RUN": (of_command("sample"), ["{}"]),
    "replay RUN": (of_command("replay"), ["{}", "--step=1"]),
    "replay --data": (of_command("replay"), ["run", "--step=1", "--data={}"]),
    "verify RUN": (of_command("verify"), ["{}"]),
    "verify --data": (of_command("verify"), ["run", "--data={}"]),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_tilde_is_expanded_and_a_dollar_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, arguments = PATHS[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / "x") in map(str, values(*(argument.format("~/x") for argument in arguments)))
    with pytest.raises(UsageError, match=r"'\$HOME/x' holds a \$, and variables are not expanded here"):
        values(*(argument.format("$HOME/x") for argument in arguments))


def test_a_file_with_a_dollar_in_its_name_is_read(tmp_path: Path) -> None:
    file = tmp_path / "Outer$Inner.java"
    file.write_text("class Inner {}")
    assert str(file) in prepare_arguments("--output", "out", "--input", str(file))
