"""The loss and gradient norm of each step, read on the host without letting the device wait for it."""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from distgpt.distributed.runtime import Runtime

# Devices that compute while the host goes on.
ASYNCHRONOUS_DEVICES = ("cuda",)


@dataclass(frozen=True)
class Figures:
    """The figures of a step, equal on all ranks."""

    step: int
    lr: float
    loss: float  # the mean over ranks
    grad_norm: float
    stop: bool  # a rank was asked to stop


class FigureReader:
    """Reads the figures of a step, on a GPU in the next step.

    There the host launches work ahead of the device. If it waited for the figures of a step before it launched the
    update, the device would be idle meanwhile.
    """

    def __init__(self, runtime: Runtime, *, at_once: bool) -> None:
        """`at_once`: never read them late."""
        self._late = runtime.device.type in ASYNCHRONOUS_DEVICES and not at_once
        self._unread: deque[tuple[int, float, Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, figures: Tensor, *, lr: float) -> None:
        """Start to copy the figures of a step, as Gradients.finish returns them, to the host."""
        copied = None
        on_host = figures.to("cpu", non_blocking=figures.is_cuda)  # to pinned memory
        if figures.is_cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._unread.append((step, lr, on_host, copied))

    def take(self, *, now: bool) -> list[Figures]:
        """Return the figures that were not taken yet, by step. All ranks take the same ones.

        Where they are read late, those of the last step stay until the next call, unless `now` or a rank was asked to
        stop.
        """
        taken: list[Figures] = []
        while self._unread and (now or not self._late or len(self._unread) > 1 or (taken and taken[-1].stop)):
            step, lr, figures, copied = self._unread.popleft()
            if copied is not None:
                copied.synchronize()
            loss, grad_norm, stops = figures.tolist()
            taken.append(Figures(step, lr, loss, grad_norm, stops > 0))
        return taken


def not_finite(figures: Tensor) -> Tensor:
    """Return 1.0 if the loss or the gradient norm of a rank is NaN or infinite, else 0.0, on the device."""
    return 1.0 - figures[:2].isfinite().all().float()
