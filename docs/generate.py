"""Write the tables of docs/configuration.md and README.md from distgpt/config.py, the presets and distgpt.plan.

    python docs/generate.py            write them anew
    python docs/generate.py --check    exit with 1 if they are out of date

Text between a `begin` and an `end` comment is generated; everything else in the files is written by hand.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from distgpt.config import NOT_NEGATIVE, POSITIVE, Config, fields_of, preset_names, resolve, value_text
from distgpt.distributed.memory import MemoryModel, state_bytes
from distgpt.model.gpt import count_parameters
from distgpt.planning.devices import device_named
from distgpt.planning.forecast import GPT2_VOCABULARY, VOCABULARIES, forecast
from distgpt.planning.layouts import make_cluster
from distgpt.planning.text import USUAL_WIDTH
from distgpt.units import duration, scaled_text, size_text

CONFIGURATION, README = Path(__file__).with_name("configuration.md"), Path(__file__).parents[1] / "README.md"
WORDS = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
# The devices of the table in README.md, with their number.
PLANNED = (("4090", 1), ("h100", 1), ("h100", 8))
# Tokens in a micro-batch that keep a GPU busy.
TOKENS = 4096


def generated() -> dict[Path, str]:
    """Return the whole files as they should be."""
    tables = {CONFIGURATION: {"presets": presets(), "keys": all_keys()}, README: {"plans": plans()}}
    return {file: _with_tables(file.read_text(encoding="utf-8"), parts) for file, parts in tables.items()}


def _with_tables(text: str, tables: dict[str, str]) -> str:
    for name, table in tables.items():
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
        vocab_size = VOCABULARIES.get(name, GPT2_VOCABULARY)
        parameters = count_parameters(model, vocab_size)
        tokens = train.steps * train.global_batch * model.block_size
        memory = f"{state_bytes(config, vocab_size) / 2**30:.2f} GiB"
        cells = (
            *(f"`{name}`", f"{parameters:,}", memory, f"{model.n_layer} x {model.n_embd}", f"{model.block_size:,}"),
            *(f"{train.global_batch:,}", f"{train.steps:,}", f"{tokens / 1e6:,.0f} million"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plans() -> str:
    """Return the table of what the presets take on a few devices, by distgpt.plan."""
    heads = [f"{count} x {device}" for device, count in PLANNED]
    lines = [f"| preset | parameters | memory | tokens | {' | '.join(heads)} |", "|---" * (4 + len(heads)) + "|"]
    configs = {name: resolve([name], {}) for name in preset_names()}
    for name, config in sorted(configs.items(), key=lambda item: (item[1].model.n_embd, item[1].model.n_layer)):
        vocab_size = VOCABULARIES.get(name, GPT2_VOCABULARY)
        need = MemoryModel(config, vocab_size, itemsize=2).need(max(1, TOKENS // config.model.block_size), shards=1)
        times = []
        for device, count in PLANNED:
            cluster = make_cluster(device, device_named(device), config, nodes=1, per_node=count)
            plan = forecast(config, cluster, [name])
            known = config.model.n_embd >= USUAL_WIDTH
            times.append("does not fit" if plan.seconds is None else duration(plan.seconds) if known else "-")
        cells = (f"`{name}`", scaled_text(plan.parameters), size_text(need), scaled_text(plan.tokens), *times)
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
    """Write the files, or compare them; the exit code."""
    wanted = generated()
    if arguments == ["--check"]:
        old = [file for file, text in wanted.items() if file.read_text(encoding="utf-8") != text]
        for file in old:
            print(f"{file} is out of date: run python docs/generate.py", file=sys.stderr)
        return bool(old)
    for file, text in wanted.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
