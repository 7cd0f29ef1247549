"""Train a GPT from scratch on your own text: the same command on a laptop, one GPU or a Slurm cluster.

As a library: `prepare` makes a dataset of text, `open_dataset` opens one, `load` loads a trained model, `read_metrics`
reads the figures of a run. Their errors are those of distgpt.errors. Importing distgpt imports nothing else: each
function is imported when it is first used, and torch when a model is loaded.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distgpt.library import TrainedModel, load, open_dataset, prepare, read_metrics

__version__ = "0.1.0"
__all__ = ["TrainedModel", "__version__", "load", "open_dataset", "prepare", "read_metrics"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("distgpt.library"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """This package. Python sets an attribute for each submodule, which would hide the function `prepare`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "prepare" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
