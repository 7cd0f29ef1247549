"""Find steps whose update should be skipped: loss or gradient norm not finite, or far above its last values.

A z-score is the distance of a value from the mean of the last values, in their standard deviations. (After the idea of
llm.c's outlier detector; here a value does not belong to the window that it is compared with.)
"""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from distgpt.config import HealthConfig

# The number of last values that a value is compared with.
WINDOW = 128
# Of fewer values, the standard deviation is too uncertain: of 32 values, its relative error is about an eighth.
MIN_VALUES = 32
# A run ends after so many skipped updates in a row: it would not recover by itself.
MAX_SKIPS = 10


def z_score(values: Collection[float], value: float) -> float | None:
    """Return how far `value` lies above the mean of `values`, in their standard deviations.

    None if it is not finite, if there are fewer than MIN_VALUES values, or if all of them are equal.
    """
    count = len(values)
    if count < MIN_VALUES or not math.isfinite(value):
        return None
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / count)
    return (value - mean) / deviation if deviation else None


@dataclass(frozen=True)
class Decision:
    """The decision on the update of a step, and the reason for it."""

    loss_z: float | None = None
    grad_norm_z: float | None = None
    action: Literal["update", "skip", "stop"] = "update"
    reason: str = ""  # the figures because of which the update is not applied
    skips: int = 0  # updates skipped in a row before this one


class OutlierFilter:
    """Compares each step of a run with the steps before it."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self.restore({})

    def check(self, *, loss: float, grad_norm: float) -> Decision:
        """Decide on the update of the next step, from its mean loss and the norm of its gradients before clipping.

        Figures of skipped steps are not compared with later ones. Ranks with equal figures come to equal decisions.
        """
        loss_z, grad_norm_z = z_score(self._losses, loss), z_score(self._grad_norms, grad_norm)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and not self._is_spike(loss_z) and not self._is_spike(grad_norm_z):
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)
            self._skips = 0
            return Decision(loss_z, grad_norm_z)
        reason = f"loss {_figure(loss, loss_z)} and gradient norm {_figure(grad_norm, grad_norm_z)}"
        skips, self._skips = self._skips, self._skips + 1
        stop = skips >= MAX_SKIPS or (not finite and self._config.on_nonfinite == "stop")
        return Decision(loss_z, grad_norm_z, "stop" if stop else "skip", reason, skips)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to make an equal filter. JSON keeps it exactly."""
        return {"losses": list(self._losses), "grad_norms": list(self._grad_norms), "skips": self._skips}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state()`. An empty one is that of a new run."""
        self._losses = deque[float](state.get("losses", ()), maxlen=WINDOW)
        self._grad_norms = deque[float](state.get("grad_norms", ()), maxlen=WINDOW)
        self._skips = int(state.get("skips", 0))

    def _is_spike(self, z: float | None) -> bool:
        return z is not None and 0 < self._config.skip_z < z


def _figure(value: float, z: float | None) -> str:
    return f"{value:.6g}" if z is None else f"{value:.6g} (z {z:.1f})"
