"""Where a forward and backward pass first stops being finite, by hooks on every module of a model."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Finding:
    """The first tensor that holds a NaN or an infinity."""

    module: str  # the name of the one that made it; empty: the model itself, outside of its layers
    phase: Phase
    tensor: str  # in words
    call: int  # which forward pass of the model, or the backward pass of which, from 0


class Probe:
    """`finding` is None as long as all is finite."""

    def __init__(self) -> None:
        self.finding: Finding | None = None
        self._calls = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Look at what every module and parameter of an unsharded model gets and gives, in this context.

        A module whose input is already bad though no module's output was is not to blame: its parent is, which
        computed the input from their outputs.
        """
        with ExitStack() as hooks, warnings.catch_warnings():
            # An embedding's input, whole numbers, has no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            hooks.callback(model.register_forward_pre_hook(self._count).remove)
            for name, module in model.named_modules():
                for handle in self._watch(name, module):
                    hooks.callback(handle.remove)
            yield

    def _watch(self, name: str, module: nn.Module) -> Iterator[Any]:
        parent = name.rpartition(".")[0]
        yield module.register_forward_hook(lambda _, given, out: self._check(name, "forward", "its output", out))
        if name:
            before, after = f"what it gives to {name}", f"the gradient that it gives to {name}"
            yield module.register_forward_pre_hook(lambda _, given: self._check(parent, "forward", before, given))
            yield module.register_full_backward_pre_hook(lambda _, given: self._check(parent, "backward", after, given))
            yield module.register_full_backward_hook(
                lambda _, out, given: self._check(name, "backward", "the gradient of its input", out)
            )
        for own, parameter in module.named_parameters(recurse=False):
            register: Any = parameter.register_post_accumulate_grad_hook  # which torch leaves untyped
            yield register(self._parameter_check(name, own))

    def _parameter_check(self, module: str, name: str) -> Callable[[Tensor], None]:
        return lambda parameter: self._check(module, "backward", f"the gradient of its {name}", parameter.grad)

    def _count(self, model: nn.Module, given: object) -> None:
        self._calls += 1

    def _check(self, module: str, phase: Phase, tensor: str, values: object) -> None:
        if self.finding is None and not _finite(values):
            self.finding = Finding(module, phase, tensor, self._calls - 1)


def _finite(values: object) -> bool:
    """Whether all numbers are, in a tensor or nested tuples of tensors; anything else counts as finite."""
    if isinstance(values, tuple):
        return all(map(_finite, values))
    return not isinstance(values, Tensor) or bool(values.isfinite().all())
