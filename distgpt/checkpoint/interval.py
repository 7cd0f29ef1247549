"""When a checkpoint is due: often enough to lose little to failures, seldom enough to lose little to saving."""

import math
from typing import Literal

DAY, HOUR = 86400.0, 3600.0
# Before anything was seen: each host fails once a day, and a save costs so many seconds.
PRIOR_SECONDS, PRIOR_COST = DAY, 0.05
LONGEST_SECONDS = HOUR
# A better interval is taken where it is so many times longer or shorter: less is noise.
NOTICEABLE = 1.25


def best_interval(*, cost: float, between_failures: float) -> float:
    """Seconds from one save to the next that lose the least: sqrt(2 * cost * between_failures), at most an hour.

    Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006 has it as the first order of
    his, good while a save costs much less than what lies between failures. All in seconds.
    """
    return min(LONGEST_SECONDS, math.sqrt(2 * cost * between_failures))


def seconds_between_failures(*, seconds: float, failures: int, hosts: int) -> float:
    """What to expect after so many seconds of training with so many failures; the prior stands for one failure."""
    return (PRIOR_SECONDS / hosts + seconds) / (1 + failures)


class SaveCost:
    """What training loses to a save: it stands still, then goes slower while the save is written."""

    def __init__(self) -> None:
        self._saves, self._stalled = 0, 0.0
        self._steps = {False: 0, True: 0}  # while a save was written, and while none was
        self._seconds = {False: 0.0, True: 0.0}

    def save(self, stalled: float) -> None:
        """Count a save that held training up for so many seconds."""
        self._saves += 1
        self._stalled += stalled

    def step(self, seconds: float, *, writing: bool) -> None:
        """Count a step; `writing`: a save was being written meanwhile."""
        self._steps[writing] += 1
        self._seconds[writing] += seconds

    @property
    def of_a_save(self) -> float:
        """Seconds; a prior before the first save."""
        if not self._saves:
            return PRIOR_COST
        slower = 0.0
        if self._steps[False]:
            undisturbed = self._seconds[False] / self._steps[False]
            slower = max(0.0, self._seconds[True] - self._steps[True] * undisturbed)
        return (self._stalled + slower) / self._saves

    @property
    def of_a_step(self) -> float:
        """Seconds; 0 before the first step."""
        return sum(self._seconds.values()) / max(1, sum(self._steps.values()))

    def best_steps(self, between_failures: float) -> int:
        """Steps, at least 1, from one save to the next, where a failure is expected every so many seconds."""
        return max(1, round(best_interval(cost=self.of_a_save, between_failures=between_failures) / self.of_a_step))


class SaveInterval:
    """Says after which steps a save is due: every so many, or (auto) as many as rank 0 found best and told the others.

    One is due as well after an evaluation that found the lowest loss so far. The same on all ranks, since they evaluate
    alike and adopt what rank 0 proposes at the same steps.
    """

    def __init__(self, every: int | Literal["auto"], *, start_step: int, best_val_loss: float | None) -> None:
        """`best_val_loss`: the lowest validation loss of a checkpoint that is there already."""
        self.auto = every == "auto"
        self.last = start_step  # the step of the last save that was begun
        self._every = 0 if every == "auto" else every
        self._best = math.inf if best_val_loss is None else best_val_loss
        self._best_step: int | None = None

    def is_due(self, step: int) -> bool:
        if step == self._best_step:
            return True
        if self.auto:
            return 0 < self._every <= step - self.last
        return self._every > 0 and step % self._every == 0

    def evaluated(self, step: int, val_loss: float) -> bool:
        """Count an evaluation after this step; whether its loss is the lowest so far."""
        best = val_loss < self._best
        if best:
            self._best, self._best_step = val_loss, step
        return best

    def saved(self, step: int) -> None:
        """A save was begun after this step."""
        self.last = step

    def adopt(self, steps: int) -> bool:
        """Take a proposal of at least 1 step if it is noticeably another interval; whether it was taken."""
        if not self.auto or (self._every and max(steps, self._every) < NOTICEABLE * min(steps, self._every)):
            return False
        self._every = steps
        return True
