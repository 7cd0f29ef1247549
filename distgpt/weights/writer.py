"""Write the weights of a checkpoint as safetensors, a file at a time, so that memory holds one file's tensors."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distgpt.checkpoint.reader import read_tensors
from distgpt.errors import StorageError
from distgpt.files import sync, write_file
from distgpt.model.gpt import GPT
from distgpt.weights.files import INDEX, WEIGHTS
from distgpt.weights.names import Layout

FILE_BYTES = 2**31
FLOAT32_BYTES = 4


def write_weights(
    checkpoint: Path,
    model: GPT,
    directory: Path,
    *,
    written: Mapping[str, torch.Size],
    layout: Layout,
) -> None:
    """Write the model of a verified checkpoint.

    `model`: that of the checkpoint, on the meta device. `written`: the shapes of the parameters to write. Rows that pad
    the vocabulary are not among them, and a bias that the model lacks is zero. `layout`: where each parameter goes.
    Raises DataError or StorageError.
    """
    groups = list(_groups(written))
    files = [WEIGHTS]
    if len(groups) > 1:
        files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    file_of: dict[str, str] = {}
    for file, group in zip(files, groups, strict=True):
        tensors = _read(checkpoint, model, group)
        converted: dict[str, Tensor] = {}
        for name, shape in group.items():
            value = tensors.pop(name)[: shape[0]] if name in tensors else torch.zeros(shape)
            converted |= layout(name, model.config).split(value)
        file_of |= dict.fromkeys(converted, file)
        _save(converted, directory / file)
    if len(files) > 1:
        total = sum(shape.numel() for shape in written.values()) * FLOAT32_BYTES
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        write_file(directory / INDEX, json.dumps(index, indent=1).encode())


def _groups(written: Mapping[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    """Yield the parameters of each file, in their order."""
    group: dict[str, torch.Size] = {}
    size = 0
    for name, shape in written.items():
        more = shape.numel() * FLOAT32_BYTES
        if group and size + more > FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = shape
        size += more
    yield group


def _read(checkpoint: Path, model: GPT, group: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    whole = model.state_dict()
    tensors = {name: torch.empty(whole[name].shape) for name in group if name in whole}
    read_tensors({"model": tensors}, checkpoint, whole={"model": whole})
    return tensors


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(stat.S_IMODE(file.parent.stat().st_mode) & 0o666)  # save_file lets only its owner read it
        sync(file)
    except (SafetensorError, OSError) as error:
        free = os.statvfs(file.parent)
        raise StorageError(f"cannot write {file} ({free.f_bavail * free.f_frsize:,} bytes are free): {error}") from None
