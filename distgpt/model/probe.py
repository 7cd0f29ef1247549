"""A search for the first NaN or infinity in a forward and backward pass, with hooks on every module of a model."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from distgpt.model.adamw import local_shard

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class NonFiniteTensor:
    """The first tensor that holds a NaN or an infinity."""

    module: str  # the name of the module that computed it; empty: the model itself, outside of its submodules
    phase: Phase
    tensor: str  # a description in words, such as "its output"
    call: int  # the number of the model's forward pass, from 0; a backward pass has the number of its forward pass


class Probe:
    """A watcher of one model's values. `finding`: the first one that is not finite, None if there is none.

    `checks`: how many were finite before it. The ranks of a run check the same values in the same order.
    """

    def __init__(self) -> None:
        self.finding: NonFiniteTensor | None = None
        self.checks = 0
        self._calls = 0

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Check, inside the context, all inputs, outputs and gradients of the modules of a model.

        If the input of a module is not finite although all outputs so far were, its parent is the cause: the parent
        computed that input.
        """
        with ExitStack() as hooks, warnings.catch_warnings():
            # An embedding's input is integer ids, which have no gradient.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            hooks.callback(model.register_forward_pre_hook(self._count_call).remove)
            for name, module in model.named_modules():
                for handle in self._register_hooks(name, module):
                    hooks.callback(handle.remove)
            yield

    def _register_hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        parent = name.rpartition(".")[0]
        yield module.register_forward_hook(lambda _, inputs, output: self._check(name, "forward", "its output", output))
        if name:
            passed, returned = f"the input that it passes to {name}", f"the gradient that it passes to {name}"
            yield module.register_forward_pre_hook(lambda _, inputs: self._check(parent, "forward", passed, inputs))
            yield module.register_full_backward_pre_hook(
                lambda _, gradients: self._check(parent, "backward", returned, gradients)
            )
            yield module.register_full_backward_hook(
                lambda _, input_gradient, __: self._check(name, "backward", "the gradient of its input", input_gradient)
            )
        for own, parameter in module.named_parameters(recurse=False):
            text, untyped = f"the gradient of its {own}", cast(Any, parameter)  # torch gives these methods no type
            yield untyped.register_hook(partial(self._check, name, "backward", text))
            yield untyped.register_post_accumulate_grad_hook(partial(self._check_accumulated, name, text))

    def _check_accumulated(self, module: str, tensor: str, parameter: Tensor) -> None:
        self._check(module, "backward", tensor, parameter.grad)

    def _count_call(self, model: nn.Module, inputs: object) -> None:
        self._calls += 1

    def _check(self, module: str, phase: Phase, tensor: str, values: object) -> None:
        if self.finding is None and not _is_finite(values):
            self.finding = NonFiniteTensor(module, phase, tensor, self._calls - 1)
        self.checks += self.finding is None


def _is_finite(values: object) -> bool:
    """Return True if a tensor, or all tensors in nested tuples, are finite. Other values count as finite."""
    if isinstance(values, tuple):
        return all(map(_is_finite, values))
    # Other ranks check the other shards.
    return not isinstance(values, Tensor) or bool(local_shard(values).isfinite().all())
