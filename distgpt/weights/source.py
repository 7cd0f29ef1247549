"""Find the weights that init.from names, and read the config of their model. Imports no torch."""

import json
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from distgpt.checkpoint.choice import NEWEST, choose, is_checkpoint
from distgpt.checkpoint.manifest import STATE, RunState, checkpoint_path, committed, read_state
from distgpt.config import Config, ModelConfig, check, from_dict
from distgpt.errors import DataError, UsageError, did_you_mean_path
from distgpt.run.paths import RunPaths
from distgpt.weights.architectures import read_config_json

CONFIG, PLAIN_CONFIG = "config.json", "config.toml"
LARGEST_CONFIG = 2**26  # bytes


def model_of_start(config: Config) -> ModelConfig:
    """Return the model of the weights that init.from names, or of the run's own checkpoint if it has one.

    Raises UsageError or DataError.
    """
    for checkpoint in committed(RunPaths(config.run_dir).checkpoints):
        with suppress(DataError):  # restoring it reports the damage
            return model_of_state(read_state(checkpoint), checkpoint)
    path, choice = parse(config.init.from_)
    if is_weights(path):
        return read_model(path)
    return model_of_state(*find_state(path, choice))


def parse(text: str) -> tuple[Path, str]:
    """Split RUN@STEP into the run and the step; without a step, the newest. Raises UsageError if RUN is no directory.

    RUN may also be a directory of weights or a checkpoint.
    """
    path, choice = Path(text), NEWEST
    if "@" in text and not path.exists():
        run, _, choice = text.rpartition("@")
        path = Path(run)
    if not path.is_dir():
        raise UsageError(f"init.from is {text}: there is no directory {path}{did_you_mean_path(path)}")
    return path, choice


def is_weights(directory: Path) -> bool:
    """Tell whether a directory holds the weights of a model, and is not a run or a checkpoint."""
    return (directory / CONFIG).is_file() or any(directory.glob("*.safetensors"))


def read_model(directory: Path) -> ModelConfig:
    """Read the model in a directory of weights, of a standard architecture or our own. Raises UsageError, DataError."""
    file = directory / (PLAIN_CONFIG if is_plain(directory) else CONFIG)
    if file.exists() and not file.is_file():
        raise DataError(f"{file} is not a file")  # opening a pipe would wait for its writer
    try:
        with file.open("rb") as stream:
            text = stream.read(LARGEST_CONFIG).decode()
        content: Any = tomllib.loads(text) if is_plain(directory) else json.loads(text)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file} is not an object of JSON")
    source = str(file)
    model = from_dict(content, source=source).model if is_plain(directory) else read_config_json(content, source=source)
    try:
        check(Config(model=model))
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return model


def is_plain(directory: Path) -> bool:
    """Tell whether weights have our own names and config, as `export --format=plain` writes them."""
    return not (directory / CONFIG).exists() and (directory / PLAIN_CONFIG).exists()


def find_state(path: Path, choice: str) -> tuple[RunState, Path]:
    """Return the state of a checkpoint, and its directory. Its tensors are not verified.

    Any checkpoint of a run will do, since all have the same model. Raises UsageError or DataError if there is none.
    """
    found = [path.resolve()] if is_checkpoint(path) else committed(path / "checkpoints")
    if choice.isdecimal():
        found = [checkpoint for checkpoint in found if checkpoint == checkpoint_path(path / "checkpoints", int(choice))]
    for checkpoint in found:
        with suppress(DataError):
            return read_state(checkpoint), checkpoint
    try:
        checkpoint = choose(path, choice)  # it says what is wrong
    except (UsageError, DataError) as error:
        raise type(error)(f"init.from: {error}") from None
    return read_state(checkpoint), checkpoint


def model_of_state(state: RunState, checkpoint: Path) -> ModelConfig:
    """Return the model of a checkpoint. Raises UsageError for keys that this version does not have."""
    return from_dict(state.config, source=str(checkpoint / STATE)).model
