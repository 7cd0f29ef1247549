"""The functions of `import distgpt`. Imports torch when a model is loaded."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from distgpt.config import Config, from_dict
from distgpt.corpus import shards
from distgpt.corpus.shards import Dataset
from distgpt.corpus.tokenizer import Tokenizer
from distgpt.errors import DataError, UsageError
from distgpt.prepare import parse
from distgpt.prepare import prepare as run_command
from distgpt.run.paths import RunPaths
from distgpt.telemetry import step_lines

if TYPE_CHECKING:
    import torch

    from distgpt.model.gpt import GPT

AnyPath = str | os.PathLike[str]


def prepare(
    inputs: AnyPath | Sequence[AnyPath],
    output: AnyPath,
    *,
    tokenizer: AnyPath = "char",
    vocab_size: int | None = None,
    val_fraction: float | None = None,
    text_key: str | None = None,
    document_separator: str | None = None,
    on_bad_document: Literal["stop", "skip", "replace"] = "stop",
    workers: int | None = None,
    shard_tokens: int | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Prepare texts, or find them prepared, and open the dataset. The options are those of distgpt.prepare.

    Raises UsageError, DataError, DirectoryError or StorageError. Worker processes import the script that calls this, so
    a script calls it under `if __name__ == "__main__":`. A notebook needs no such line.
    """
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    options = {
        "output": os.fspath(output),
        "tokenizer": os.fspath(tokenizer),
        "vocab-size": vocab_size,
        "val-fraction": val_fraction,
        "text-key": text_key,
        "document-separator": document_separator,
        "on-bad-document": on_bad_document,
        "workers": workers,
        "shard-tokens": shard_tokens,
    }
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    arguments += ["--overwrite"] if overwrite else []
    run_command(parse([*arguments, "--input", *(os.fspath(path) for path in paths)]))
    return open_dataset(output)


def open_dataset(path: AnyPath) -> Dataset:
    """Open a prepared directory: its splits are memory maps of tokens. Raises DataError if it is not whole."""
    return shards.open_dataset(Path(path))


def read_metrics(run: AnyPath) -> dict[str, NDArray[Any]]:
    """Read the figures of a run directory as columns with a row for each step, of which pandas makes a DataFrame.

    `step` is int64. All else is float64, and NaN where a step has no value: `loss` is logged at other steps than
    `val_loss`. StepFigures in telemetry/metrics.py says what each is. Raises StorageError if there are none.
    """
    return as_table(step_lines.read_lines(RunPaths(Path(run)).metrics))


def as_table(lines: Iterable[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    """Return the lines of metrics.jsonl as columns, see read_metrics()."""
    rows: dict[int, dict[str, Any]] = {}
    for line in lines:
        rows.setdefault(line["step"], {}).update(line)
    names = dict.fromkeys(["step", *(name for row in rows.values() for name in row)])
    table: dict[str, NDArray[Any]] = {}
    for name in names:
        values = [row.get(name) for row in rows.values()]
        table[name] = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    return {**table, "step": np.array(list(rows), dtype=np.int64)}


@dataclass(frozen=True)
class TrainedModel:
    """The model of a checkpoint, in eval mode, with its tokenizer, the config of its run and its step."""

    model: "GPT"
    tokenizer: Tokenizer
    config: Config
    step: int

    def generate(
        self,
        prompt: str = "",
        *,
        tokens: int = 500,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """Return how the model continues a prompt, as distgpt.sample does with the same options.

        `tokens`: how many it writes at most. It also ends before `stop`, or any of several, and at the end of a
        document. Sampling in model/generate.py defines the other options. Raises UsageError for a value out of range,
        or a prompt with a character that the tokenizer lacks.
        """
        from distgpt.distributed.device import compute_dtype
        from distgpt.distributed.parallelize import autocast
        from distgpt.model.generate import Sampling
        from distgpt.training.text import Text, write

        stops = [stop] if isinstance(stop, str) else stop
        conditions = {
            f"tokens is {tokens}: it cannot be negative": tokens >= 0,
            f"seed is {seed}: it must lie between 0 and 2^63": 0 <= seed < 2**63,
            "stop has an empty text: give the text before which a sample ends": "" not in stops,
        }
        for problem, holds in conditions.items():
            if not holds:
                raise UsageError(problem)
        try:
            sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
            text = Text(prompt, self.tokenizer, seed=seed, max_tokens=tokens, stops=stops)
        except (ValueError, DataError) as error:  # text that is not UTF-8 raises a ValueError
            raise UsageError(str(error)) from None
        device = next(self.model.parameters()).device
        with (
            autocast(device, compute_dtype(self.config.train.dtype, device)),
            closing(write(self.model, [text], sampling)) as new_tokens,
        ):
            while text.end is None:
                next(new_tokens)
        return text.written


def load(run: AnyPath, checkpoint: str | int = "newest", *, device: "torch.device | str | None" = None) -> TrainedModel:
    """Verify and load a checkpoint of a run directory: "best", "newest", a step, or the directory of a checkpoint.

    `device`: the first GPU by default, if there is one. Raises UsageError, DataError or StorageError.
    """
    import torch

    from distgpt.checkpoint.reader import load_for_inference

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer, state = load_for_inference(Path(run), chosen, str(checkpoint))
    return TrainedModel(model, tokenizer, from_dict(state.config, source=str(run)), state.step)
