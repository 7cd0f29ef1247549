"""Directories of weights in safetensors, one file or several, read a slice at a time. A pickle is never read."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distgpt.errors import DataError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
# Files are saved with the prefix of the whole model or, as OpenAI's GPT-2 is, without it.
PREFIXES = ("transformer.", "model.")


class WeightFiles:
    """The tensors in the safetensors files of a directory. Raises DataError if a file is missing or damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for name in _file_names(directory):
            try:
                file: Any = safe_open(directory / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DataError(f"{directory / name} cannot be read: {error}") from None
            self._files[name] = file
            self._file_of |= dict.fromkeys(file.keys(), name)

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._file_of)

    def find(self, name: str) -> str:
        """Return the name under which a tensor is stored, perhaps without its prefix. Raises DataError without one."""
        for prefix in ("", *PREFIXES):
            if name.startswith(prefix) and name.removeprefix(prefix) in self._file_of:
                return name.removeprefix(prefix)
        raise DataError(f"{self.directory} holds no tensor {name}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises DataError for a type of numbers that is not read."""
        tensor = self._slice(name)
        if tensor.get_dtype() not in DTYPES:
            raise DataError(f"{self.directory} holds {name} as {tensor.get_dtype()}: distgpt reads {', '.join(DTYPES)}")
        return tuple(tensor.get_shape())

    def read(self, name: str, *ranges: range) -> Tensor:
        """Read a part of a tensor: a range of indices for each dim."""
        value: Tensor = self._slice(name)[tuple(slice(part.start, part.stop) for part in ranges)]
        return value.to(torch.float32)

    def _slice(self, name: str) -> Any:
        return self._files[self._file_of[name]].get_slice(name)


def _file_names(directory: Path) -> list[str]:
    """List the files of the weights, as the index names them if there is one. Raises DataError."""
    if (directory / INDEX).is_file():
        try:
            content = json.loads((directory / INDEX).read_bytes())
            names = dict.fromkeys(map(str, content["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"cannot read {directory / INDEX}: {error}") from None
        if not names or any("/" in name or not name.endswith(".safetensors") for name in names):
            raise DataError(f"{directory / INDEX} does not name the files of the weights")
        return list(names)
    if (directory / WEIGHTS).is_file():
        return [WEIGHTS]
    pickles = sorted(file.name for suffix in ("*.bin", "*.pt", "*.pth") for file in directory.glob(suffix))
    hint = f" ({pickles[0]} is a pickle, which can run code and is not read)" if pickles else ""
    raise DataError(f"{directory} holds no {WEIGHTS}{hint}")
