"""Write a trained model for other programs: `python -m distgpt.export RUN DIR`."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("export")

import argparse
import os
import re
from dataclasses import replace
from pathlib import Path

from distgpt.checkpoint.choice import choose
from distgpt.checkpoint.manifest import STATE, TOKENIZER, RunState, read_state
from distgpt.checkpoint.reader import read_tokenizer, require_model
from distgpt.config import Config, from_dict, to_toml
from distgpt.corpus.preparing import staging
from distgpt.errors import DirectoryError, UsageError
from distgpt.files import write_file
from distgpt.model.gpt import meta_model, with_explicit_sizes
from distgpt.weights.architectures import CLASSES, architecture_of, config_json, with_all_biases
from distgpt.weights.companions import json_file, model_card, standard_files
from distgpt.weights.names import layout_of
from distgpt.weights.source import CONFIG, PLAIN_CONFIG
from distgpt.weights.writer import write_weights

EXPORTED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|README\.md|config\.toml"
    r"|(config|generation_config|tokenizer|tokenizer_config)\.json"
)


def main(arguments: argparse.Namespace) -> None:
    """Choose and verify a checkpoint, write its model to a staging directory, and give that its name.

    No other export to the same output runs meanwhile.
    """
    output = Path(os.path.realpath(arguments.output))
    with staging.exclusive(output) as directory:
        require_free(output, overwrite=arguments.overwrite)
        checkpoint = choose(Path(arguments.run), arguments.checkpoint)
        state = read_state(checkpoint)
        config = from_dict(state.config, source=str(checkpoint / STATE))
        require_model(checkpoint, config, state.vocab_size)
        plain = arguments.format == "plain"
        if not plain:
            require_standard(config)
        staging.begin(directory, {"checkpoint": str(checkpoint.resolve()), "format": arguments.format})
        try:
            write_model(checkpoint, state, config, directory / staging.DATASET, plain=plain)
            staging.commit(directory, output)
        finally:
            staging.clear(directory)
    print(f"wrote step {state.step:,} of {arguments.run} to {arguments.output}")


def require_free(output: Path, *, overwrite: bool) -> None:
    """Raise DirectoryError unless the output does not exist, is empty, or is an export to overwrite."""
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise DirectoryError(f"{output} is a file: choose another directory")
    names = os.listdir(output)
    if names and not overwrite:
        raise DirectoryError(f"{output} is not empty: choose another directory, or --overwrite it")
    others = sorted(name for name in names if not EXPORTED.fullmatch(name))
    if others:
        raise DirectoryError(f"{output} holds {others[0]}, which no export wrote: --overwrite would destroy it")


def require_standard(config: Config) -> None:
    """Raise UsageError with the reasons if no standard architecture computes this model."""
    try:
        architecture_of(config.model)
    except UsageError as error:
        raise UsageError(
            f"no standard architecture computes this model ({error}): --format=plain writes its weights as they are"
        ) from None


def write_model(checkpoint: Path, state: RunState, config: Config, directory: Path, *, plain: bool) -> None:
    """Write all files of an export. Raises DataError, StorageError or OSError."""
    tokenizer = read_tokenizer(checkpoint, state)
    explicit = with_explicit_sizes(config.model)
    standard = explicit if plain else with_all_biases(explicit)
    model = meta_model(explicit, state.vocab_size)
    written = meta_model(replace(standard, vocab_multiple=1), state.vocab_size)
    shapes = {name: parameter.shape for name, parameter in written.state_dict().items()}
    write_weights(checkpoint, model, directory, written=shapes, layout=layout_of(plain=plain))
    if plain:
        files = {PLAIN_CONFIG: to_toml(config).encode(), TOKENIZER: tokenizer.to_json().encode()}
    else:
        content = config_json(standard, vocab_size=state.vocab_size, eot_id=state.eot_id)
        files = {CONFIG: json_file(content), **standard_files(config, state, tokenizer)}
    architecture = None if plain else CLASSES[architecture_of(standard)]
    parameters = sum(shape.numel() for shape in shapes.values())
    files["README.md"] = model_card(checkpoint, config, state, parameters=parameters, architecture=architecture)
    for name, raw in files.items():
        write_file(directory / name, raw)
