"""Report a step: show and record it, name slow ranks, adapt the save interval, explain a skipped update."""

import logging
import math
from collections.abc import Sequence

import torch

from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.interval import SaveInterval, seconds_between_failures
from distgpt.config import Config
from distgpt.corpus.loader import Loader
from distgpt.distributed.collectives import sum_over_ranks
from distgpt.distributed.plan import Plan
from distgpt.health.outliers import Decision
from distgpt.health.stragglers import StragglerMonitor
from distgpt.telemetry.peaks import device_peak_flops
from distgpt.telemetry.progress import Progress
from distgpt.training.figures import Figures

log = logging.getLogger("distgpt")


class StepReporter:
    """Reports the steps of a run after `start_step`. All ranks call it, since they exchange figures."""

    def __init__(
        self,
        plan: Plan,
        progress: Progress,
        stragglers: StragglerMonitor,
        interval: SaveInterval,
        checkpoints: Checkpointer,
        *,
        start_step: int,
    ) -> None:
        self._plan, self._progress, self._stragglers = plan, progress, stragglers
        self._interval, self._checkpoints, self._first_step = interval, checkpoints, start_step + 1
        self._seconds = 0.0

    def step_done(self, step: int, *, data_wait: float) -> None:
        """Record a step that was taken. `data_wait`: seconds for which this rank waited for data in it."""
        self._seconds = self._progress.step_done(step, data_wait=data_wait)
        save_seconds, saved_bytes = self._checkpoints.pop_write_stats()
        self._stragglers.end_step(data_wait=data_wait, save_seconds=save_seconds, saved_bytes=saved_bytes)
        if step > self._first_step:  # the first step warms up
            self._interval.record_step(self._seconds, writing=self._checkpoints.writing)

    def report(self, decided: Sequence[tuple[Figures, Decision]]) -> None:
        """Report steps whose figures have been read, and the decisions on them."""
        for figures, decision in decided:
            self._report(figures, decision)

    def _report(self, figures: Figures, decision: Decision) -> None:
        step = figures.step
        if self._progress.is_logged(step) or decision.action == "skip":
            elapsed = self._progress.log(
                step, loss=figures.loss, lr=figures.lr, grad_norm=figures.grad_norm, decision=decision
            )
            if step == self._first_step:
                self._stragglers.reset()
            else:
                self._compare_ranks(step, elapsed)
                if self._interval.auto:
                    self._reconsider_interval()
        self._progress.predict(step, self._seconds)

    def _compare_ranks(self, step: int, seconds: float) -> None:
        if not self._plan.runtime.distributed:
            self._stragglers.reset()
            return
        messages, figures = self._stragglers.compare(seconds)
        if self._plan.runtime.rank == 0:
            for line in messages:
                log.info(line)
        self._progress.rank_comparison(step, messages, figures)

    def _reconsider_interval(self) -> None:
        spent, runtime = self._progress.goodput.so_far(), self._plan.runtime
        between_failures = seconds_between_failures(
            seconds=spent.total - spent.seconds["recovery"],
            failures=spent.failures,
            hosts=runtime.world_size // runtime.local_world_size,
        )
        if steps := self._interval.reconsider(between_failures, runtime):
            self._progress.save_interval(
                steps,
                step_seconds=self._interval.seconds_per_step,
                cost=self._interval.seconds_per_save,
                between_failures=between_failures,
            )


def peak_tokens_per_second(plan: Plan, *, flops_per_token: float) -> float | None:
    """Return the tokens per second at the peak speed of all ranks, None if one has an unknown device.

    All ranks call it. Work that the model does not need, such as recomputed activations, is not in `flops_per_token`.
    """
    runtime = plan.runtime
    peak = device_peak_flops(runtime.device, plan.dtype)
    value = torch.tensor(math.nan if peak is None else peak, dtype=torch.float64, device=runtime.float64_device)
    total = sum_over_ranks(value, runtime).item()
    return None if math.isnan(total) else total / flops_per_token


def explain_outlier(decision: Decision, step: int, config: Config, batches: Loader) -> str:
    """Say in one line why the update of a step is not applied, and which samples it has; log their windows."""
    completed = step - 1
    places = [(int(shard), int(offset)) for shard, offset in zip(*batches.places(completed), strict=True)]
    log.error("step %d, windows of this rank as (shard, token offset): %s", step, places)
    first = completed * config.train.global_batch
    samples = f"samples {first} to {first + config.train.global_batch - 1} (their places are in logs/)"
    if decision.action == "skip":
        return f"{decision.reason} at step {step}: update skipped; {samples}"
    after = f", after {decision.skips} skipped in a row" if decision.skips else ""
    fix = "lower optim.lr or set optim.grad_clip" + (", or raise health.skip_z" if config.health.skip_z else "")
    return f"{decision.reason} at step {step}: stopped before the update{after}; {samples}; {fix}"
