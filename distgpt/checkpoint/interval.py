"""Decide when a checkpoint is due: often enough to lose little to failures, seldom enough to lose little to saving."""

import math
from typing import Literal

import torch

from distgpt.distributed.collectives import sum_over_ranks
from distgpt.distributed.runtime import Runtime

DAY, HOUR = 86400.0, 3600.0
# Assumed until a run has measured them: each host fails once a day, and a save costs 0.05 s.
PRIOR_SECONDS_BETWEEN_FAILURES, PRIOR_SECONDS_PER_SAVE = DAY, 0.05
MAX_INTERVAL_SECONDS = HOUR
# A new interval is adopted if it differs by at least this factor. Less is noise.
MIN_CHANGE_FACTOR = 1.25


def best_interval(*, cost: float, between_failures: float) -> float:
    """Return the time between saves that loses the least: sqrt(2 * cost * between_failures), at most an hour.

    Young 1974, "A first order approximation to the optimum checkpoint interval". Daly 2006 has the same first order,
    which is good while a save costs much less than the time between failures. All in seconds.
    """
    return min(MAX_INTERVAL_SECONDS, math.sqrt(2 * cost * between_failures))


def seconds_between_failures(*, seconds: float, failures: int, hosts: int) -> float:
    """Estimate the time between failures from `seconds` of training. The prior counts as one failure."""
    return (PRIOR_SECONDS_BETWEEN_FAILURES / hosts + seconds) / (1 + failures)


class SaveInterval:
    """Decides after which steps to save: at a fixed interval, or with "auto" at the best one by rank 0's measurements.

    A save is also due after an evaluation with the lowest loss so far. All ranks make the same decisions: they have the
    same validation losses, and adopt the proposals of rank 0 at the same steps.
    """

    def __init__(self, every: int | Literal["auto"], *, start_step: int, best_val_loss: float | None) -> None:
        """`best_val_loss`: the lowest validation loss of the checkpoints that exist already."""
        self.auto = every == "auto"
        self.last_save = start_step  # the step after which the last save began
        self._saves, self._stalled = 0, 0.0  # the number of saves, and the seconds for which they stopped training
        # The number and the seconds of steps, by whether a save was being written during the step.
        self._steps = {False: 0, True: 0}
        self._seconds = {False: 0.0, True: 0.0}
        self._every = 0 if every == "auto" else every
        self._best = math.inf if best_val_loss is None else best_val_loss
        self._best_step: int | None = None

    def is_due(self, step: int) -> bool:
        """Tell whether a save is due after this step."""
        if step == self._best_step:
            return True
        if self.auto:
            return 0 < self._every <= step - self.last_save
        return self._every > 0 and step % self._every == 0

    def record_evaluation(self, step: int, val_loss: float) -> bool:
        """Record an evaluation after this step; tell whether its loss is the lowest so far."""
        best = val_loss < self._best
        if best:
            self._best, self._best_step = val_loss, step
        return best

    def record_save(self, step: int, *, stalled: float) -> None:
        """Record a save that began after this step and stopped training for `stalled` seconds."""
        self.last_save = step
        self._saves += 1
        self._stalled += stalled

    def record_step(self, seconds: float, *, writing: bool) -> None:
        """Record the seconds of a step; `writing`: a save was being written during the step."""
        self._steps[writing] += 1
        self._seconds[writing] += seconds

    @property
    def seconds_per_save(self) -> float:
        """The seconds of training that a save costs: it stops for a moment, then is slower while the save is written.

        PRIOR_SECONDS_PER_SAVE before the first save.
        """
        if not self._saves:
            return PRIOR_SECONDS_PER_SAVE
        slower = 0.0
        if self._steps[False]:
            undisturbed = self._seconds[False] / self._steps[False]
            slower = max(0.0, self._seconds[True] - self._steps[True] * undisturbed)
        return (self._stalled + slower) / self._saves

    @property
    def seconds_per_step(self) -> float:
        """The seconds that a step takes; 0 before the first step."""
        return sum(self._seconds.values()) / max(1, sum(self._steps.values()))

    def best_steps(self, between_failures: float) -> int:
        """Return the best number of steps between saves, at least 1; `between_failures` in seconds."""
        seconds = best_interval(cost=self.seconds_per_save, between_failures=between_failures)
        return max(1, round(seconds / self.seconds_per_step))

    def reconsider(self, between_failures: float, runtime: Runtime) -> int | None:
        """Find the best interval on rank 0, and adopt it on all ranks if "auto" is on. All ranks call it.

        Returns the new interval in steps, None if it does not change. `between_failures`: in seconds.
        """
        proposal = self.best_steps(between_failures) if runtime.rank == 0 else 0
        steps = int(sum_over_ranks(torch.tensor([proposal], device=runtime.device), runtime).item())
        return steps if self.adopt(steps) else None

    def adopt(self, steps: int) -> bool:
        """With "auto", adopt an interval of `steps` unless it hardly differs; tell whether it was adopted."""
        if not self.auto or (self._every and max(steps, self._every) < MIN_CHANGE_FACTOR * min(steps, self._every)):
            return False
        self._every = steps
        return True
