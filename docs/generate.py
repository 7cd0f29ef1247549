"""Write the tables of docs/configuration.md from distgpt/config.py and the presets.

    python docs/generate.py            write them anew
    python docs/generate.py --check    exit with 1 if they are out of date

Text between a `begin` and an `end` comment is generated; everything else in the file is written by hand.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from distgpt.config import NOT_NEGATIVE, POSITIVE, Config, fields_of, preset_names, resolve, value_text
from distgpt.model.gpt import count_parameters

FILE = Path(__file__).with_name("configuration.md")
WORDS = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
# The vocabulary of what a preset is meant for: tinyshakespeare's characters, the quickstart's, GPT-2's tokens.
VOCABULARIES = {"seed": 65, "quickstart": 223}
GPT2_VOCABULARY = 50_257
# float32 weights and gradients, and AdamW's two moments.
BYTES_PER_PARAMETER = 16


def generated() -> str:
    """Return the whole file as it should be."""
    text = FILE.read_text(encoding="utf-8")
    for name, table in (("presets", presets()), ("keys", all_keys())):
        before, begin, rest = text.partition(f"<!-- begin {name}: made by docs/generate.py -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def presets() -> str:
    """Return the table of presets."""
    lines = [
        "| preset | parameters | weights, gradients, moments | layers x width | context | batch | steps | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in preset_names():
        config = resolve([name], {})
        model, train = config.model, config.train
        parameters = count_parameters(model, VOCABULARIES.get(name, GPT2_VOCABULARY))
        tokens = train.steps * train.global_batch * model.block_size
        memory = f"{parameters * BYTES_PER_PARAMETER / 2**30:.2f} GiB"
        cells = (
            *(f"`{name}`", f"{parameters:,}", memory, f"{model.n_layer} x {model.n_embd}", f"{model.block_size:,}"),
            *(f"{train.global_batch:,}", f"{train.steps:,}", f"{tokens / 1e6:,.0f} million"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def all_keys() -> str:
    """Return a heading and a table for each section."""
    parts = []
    for section in dataclasses.fields(Config):
        kind = get_type_hints(Config)[section.name]
        parts += [
            f"### {section.name}",
            "",
            kind.__doc__,
            "",
            "| key | default | values | meaning |",
            "|---|---|---|---|",
        ]
        parts += [
            _row(f"{section.name}.{name}", key, get_type_hints(kind)[key.name])
            for name, key in fields_of(section.name).items()
        ]
        parts.append("")
    return "\n".join(parts)


def _row(name: str, key: dataclasses.Field[Any], kind: Any) -> str:
    default = "empty" if key.default == "" else f"`{value_text(key.default)}`"
    cells = (f"`{name}`", default, _values(kind, name), key.metadata["help"])
    return f"| {' | '.join(cell.replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |"


def _values(kind: Any, name: str) -> str:
    """Return the values that a key takes, in words."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is Union or type(kind).__name__ == "UnionType":
        return " or ".join(_values(part, name) for part in get_args(kind))
    limits = []
    if name in POSITIVE:
        limits.append("from 1" if kind is int else "above 0")
    elif name in NOT_NEGATIVE:
        limits.append("from 0")
    return ", ".join([WORDS[kind], *limits])


def main(arguments: list[str]) -> int:
    """Write the file, or compare it; the exit code."""
    wanted = generated()
    if arguments == ["--check"]:
        if FILE.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{FILE} is out of date: run python docs/generate.py", file=sys.stderr)
        return 1
    FILE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
