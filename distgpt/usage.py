"""The use of commands: their options, and --help in the width of the terminal. Imports no torch."""

import argparse
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from distgpt.config import (
    Config,
    ModelConfig,
    fields_of,
    preset_names,
    resolve,
    section_type,
    split_arguments,
    to_toml,
    value_at,
    value_text,
)
from distgpt.errors import UsageError, did_you_mean

MIN_COLUMNS, MAX_COLUMNS = 40, 120
# As wide as the labels in the first lines of a run.
LABEL = " " * 10
# Where the second column of --help begins.
SECOND_COLUMN = 34
UNBROKEN = "\N{NO-BREAK SPACE}"
METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}
VALUES = (
    "N, STEPS, TOKENS, SEQUENCES and RANKS are whole numbers, X and SECONDS are numbers. The variable "
    "DISTGPT_SECTION__KEY sets a key as well; flags override it. A ~ is expanded in paths, variables are not."
)


def columns() -> int:
    """Return the width of the terminal, 80 without one. The variable COLUMNS overrides both."""
    return max(MIN_COLUMNS, shutil.get_terminal_size((80, 24)).columns)


def wrapped(line: str) -> str:
    """Return a line that begins with a label, with its text wrapped beside the label."""
    return textwrap.fill(line, columns(), subsequent_indent=LABEL, break_long_words=False, break_on_hyphens=False)


class HelpFormatter(argparse.HelpFormatter):
    """Fills the width of the terminal: the paragraphs of a text each by itself, and a usage that is too long."""

    def __init__(self, prog: str) -> None:
        width = min(columns(), MAX_COLUMNS) - 2
        super().__init__(prog, max_help_position=min(SECOND_COLUMN, width // 3), width=width)

    def _format_usage(self, *arguments: Any) -> str:
        usage = super()._format_usage(*arguments)
        if max(map(len, usage.splitlines()), default=0) <= self._width:
            return usage
        usage = textwrap.fill(" ".join(usage.split()), self._width, subsequent_indent=" " * len("usage: "))
        return f"{usage}\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = (textwrap.fill(part, width, break_on_hyphens=False) for part in text.strip().split("\n\n"))
        return textwrap.indent("\n\n".join(parts), indent)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError for a wrong option, so that the error is printed on one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        hint = ""
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            hint = did_you_mean(unknown[1], re.findall(r"--[\w-]+", self.format_usage()))
        elif unknown := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            hint = did_you_mean(unknown[1], re.findall(r"[^\s',]+", unknown[2]))
        raise UsageError(f"{message}{hint} (--help shows the options)")


def config_from_command_line(
    arguments: Sequence[str],
    *,
    prog: str,
    about: str,
    options: Mapping[str, str] | None = None,
    model_of: Callable[[Config], ModelConfig] | None = None,
) -> Config:
    """Resolve the command line of a command that takes a config; `model_of` as for resolve().

    `options`: other options of the command and their meaning, for --help. Prints and exits with 0 for --help and
    --print-config. Raises UsageError for a config that cannot work.
    """
    shows_help = [argument for argument in arguments if argument.partition("=")[0] in ("-h", "--help")]
    only_shows = {*shows_help, "--print-config"}
    values = [argument for argument in arguments if argument not in only_shows]
    if shows_help:
        files, _ = split_arguments(values)
        section = shows_help[-1].partition("=")[2]
        print(config_help(prog, about, files=files, section=section, options=options or {}), end="")
        sys.exit(0)
    config = resolve(values, os.environ, model_of=model_of)
    if "--print-config" in arguments:
        print(to_toml(config), end="")
        sys.exit(0)
    return config


def config_help(
    prog: str, about: str, *, files: Sequence[str] = (), section: str = "", options: Mapping[str, str] | None = None
) -> str:
    """Return --help of a command that takes a config: every key, or those of one section, with its value.

    A value that presets or files set is shown with their names. Raises UsageError for an unknown section or file.
    """
    names = [known.name for known in fields(Config)]
    if section and section not in names:
        raise UsageError(f"--help={section}: the sections are {', '.join(names)}{did_you_mean(section, names)}")
    config, default, label = resolve(files, {}), Config(), " ".join(files)
    usage = f"python -m {prog} [PRESET or FILE.toml ...] [--SECTION.KEY=VALUE ...]"
    parser = Parser(usage=usage, description=about, epilog=VALUES, add_help=False)
    if not section:
        general = parser.add_argument_group("options")
        general.add_argument("--help=SECTION", action="store_true", help=f"only the keys of {', '.join(names)}")
        general.add_argument("--help", "-h", action="store_true", help="every key; after a preset, with its values")
        general.add_argument("--print-config", action="store_true", help="print all values as TOML")
        for option, meaning in (options or {}).items():
            general.add_argument(option, action="store_true", help=meaning)
        parser.add_argument_group("presets", ", ".join(preset_names()))
    for name in [section] if section else names:
        group = parser.add_argument_group(name, section_type(name).__doc__)
        for key, field in fields_of(name).items():
            value, usual = value_at(config, f"{name}.{key}"), value_at(default, f"{name}.{key}")
            shown = f"({label if value != usual else 'default'}: {_shown(value)})".replace(" ", UNBROKEN)
            meaning = f"{field.metadata['help']} {shown}".replace("%", "%%")
            group.add_argument(f"--{name}.{key}={_metavar(name, field)}", action="store_true", help=meaning)
    return parser.format_help().replace(UNBROKEN, " ")


def _metavar(section: str, field: Field[Any]) -> str:
    """Return what the value of a key is: its unit or type, or its choices."""
    kind = get_type_hints(section_type(section))[field.name]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    number, *words = [kind] if isinstance(kind, type) else get_args(kind)
    return "|".join([field.metadata["unit"] or METAVARS[number], *(word for part in words for word in get_args(part))])


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else value_text(value)
