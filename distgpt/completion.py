"""Print a script that completes `distgpt` in a shell: `eval "$(distgpt completion bash)"`."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("completion")

import argparse
import contextlib
import io
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

from distgpt.config import Config, preset_names

# An option, or choices, at the beginning of a line of --help; and the value of the option.
OPTION = re.compile(r"^  (?:-\w, )?(--[\w.-]+|\{[\w,]+\})(?:([= ])([\w|]+|\{[\w,]+\}))?", re.MULTILINE)
BASH = """\
_distgpt() {
    local line=${COMP_LINE:0:COMP_POINT} words= candidate
    local word=${line##*[[:space:]]}
    case ${COMP_WORDS[1]} in
@CASES@
    esac
    if ((COMP_CWORD == 1)); then words="@COMMANDS@"; fi
    COMPREPLY=()
    for candidate in $(compgen -W "$words" -- "$word"); do
        # bash replaces only what follows the =
        if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then candidate=${candidate#"${word%=*}="}; fi
        COMPREPLY+=("$candidate")
    done
    if [[ ${COMPREPLY[*]} == *= ]]; then compopt -o nospace 2>/dev/null; fi
}
complete -o default -F _distgpt distgpt
"""
ZSH = """\
_distgpt() {
    local words_of_command
    case $words[2] in
@CASES@
    esac
    if ((CURRENT == 2)); then words_of_command="@COMMANDS@"; fi
    local -a candidates=(${=words_of_command})
    compadd -- ${candidates:#*=}
    compadd -S '' -- ${(M)candidates:#*=}
    if ((CURRENT > 2)); then compset -P '*='; _files; fi
}
(($+functions[compdef])) || { autoload -Uz compinit && compinit; }
compdef _distgpt distgpt
"""


def main(arguments: argparse.Namespace) -> None:
    """Print the script for the shell that is named."""
    print(script(arguments.shell, {name: words_of(help_of(name)) for name in cli.COMMANDS}), end="")


def script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """Return the script, from the words that may follow each command."""
    template, variable = (BASH, "words") if shell == "bash" else (ZSH, "words_of_command")
    words = {**words, "launch": ["local", "nodes", *words["train"]]}
    cases = "\n".join(f'    {name}) {variable}="{" ".join(known)}" ;;' for name, known in words.items())
    return template.replace("@CASES@", cases).replace("@COMMANDS@", " ".join(words))


def help_of(command: str) -> str:
    """Return the text of --help of a command."""
    options, arguments = cli.COMMANDS[command].options, sys.argv
    sys.argv = [command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        if options is not None:
            options(sys.argv[1:])
        runpy.run_module(f"distgpt.{command}", run_name="__main__")
    sys.argv = arguments
    return text.getvalue()


def words_of(text: str) -> list[str]:
    """Return the options, values, presets and sections that a text of --help has."""
    words = preset_names() if "PRESET" in text else []
    for option, separator, value in OPTION.findall(text):
        if option.startswith("{"):
            words += choices(option)
        elif value == "SECTION":
            words += [f"{option}={section.name}" for section in fields(Config)]
        else:
            words += [f"{option}={choice}" for choice in choices(value)]
            words += [f"{option}="] if separator == "=" and re.search("[A-Z]", value) else []
            words += [option] if separator != "=" else []
    return words


def choices(value: str) -> list[str]:
    """Return the words of auto|float32 or {a,b}, without what stands for other values, in capitals."""
    return [word for word in re.findall(r"\w+", value) if not word.isupper()]
