"""One run as rank 0 shows it: times the steps and hands what was measured to the console, Metrics and the Ledger."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from types import TracebackType
from typing import Self

import torch
from torch import nn

from distgpt.checkpoint.interval import SaveCost, SaveInterval, seconds_between_failures
from distgpt.config import Config, to_toml
from distgpt.distributed.collectives import gathered, hosts_of_ranks, sum_over_ranks
from distgpt.distributed.parallelize import unwrap_model
from distgpt.distributed.runtime import Runtime
from distgpt.errors import Interrupted, StorageError
from distgpt.health.outliers import Verdict
from distgpt.health.stragglers import OwnWork, Watch, Work
from distgpt.run.paths import RunPaths
from distgpt.telemetry.console import Console, duration, step_time
from distgpt.telemetry.goodput import End, Ledger
from distgpt.telemetry.metrics import Metrics, StepFigures, memory_bytes, perplexity
from distgpt.telemetry.peaks import device_peak_flops, mfu
from distgpt.telemetry.plots import plot_losses
from distgpt.training.evaluation import Evaluation

log = logging.getLogger("distgpt")

# After so many steps or seconds, the time that a run takes is predicted.
PREDICTING_STEPS, PREDICTING_SECONDS = 3, 20.0


class Progress:
    """All ranks make one, and call it alike, since they exchange figures; only rank 0's writes and prints."""

    def __init__(
        self,
        paths: RunPaths,
        *,
        config: Config,
        runtime: Runtime,
        model: nn.Module,
        dtype: torch.dtype,
        start_step: int,
        saves: SaveInterval,
        require_owned: Callable[[], object],
    ) -> None:
        """`require_owned` is called before each write to the run directory, see `Run.require_owned`."""
        self._paths, self._config, self._runtime = paths, config, runtime
        self._flops_per_token = unwrap_model(model).flops_per_token()
        self._peak_flops = _peak_of_all(runtime, dtype)
        enabled = runtime.rank == 0
        self._require_owned = require_owned
        self._metrics = Metrics(paths.root, resume_step=start_step, require_owned=require_owned) if enabled else None
        ledger = paths.goodput if enabled else None
        self._ledger = Ledger(ledger, start_step=start_step, require_owned=require_owned)
        self._console = Console(config.train.steps, start_step, enabled)
        self._start_step = self._logged_step = start_step
        self._since = time.perf_counter()
        self._paused = self._checkpoint_stall = 0.0
        self._first_steps: list[float] = []
        self._predicted = False
        self._work = Work()
        self._own_work = OwnWork(model, runtime.device)
        self._watch = Watch(hosts_of_ranks(runtime))
        self._saves, self._save_cost = saves, SaveCost()
        if self._metrics is not None:
            self._metrics.text("config", to_toml(config), start_step)
        self._write_ledger()
        self._own_work.begin()

    def micro_batch(self, done: int, count: int) -> None:
        """Show that so many of this rank's micro-batches of the step under way are done."""
        self._console.micro_batch(done, count)

    def waited(self, seconds: float) -> None:
        """Count what this rank waited for the others in the middle of a step: that is no work of its own."""
        self._own_work.leave_out(seconds)

    def step(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        grad_norm: float,
        verdict: Verdict,
        data_wait: float,
        saving: bool,
        saved: tuple[float, float],
    ) -> None:
        """Count a finished optimizer step.

        `saving`: with a save under way; `saved`: seconds and bytes of this rank's share of those that came to an end.

        Logs where log.every says, the first one, which warms up, the last, and each whose update was skipped.
        """
        self._console.advance()
        seconds = self._ledger.step(step, data_wait=data_wait)
        self._write_ledger()
        if step > self._start_step + 1:
            self._save_cost.step(seconds, writing=saving)
        self._work += Work(self._own_work.seconds(), data_wait, *saved)
        if self._is_logged(step) or verdict.action == "skip":
            self._log(step, loss=loss, lr=lr, grad_norm=grad_norm, verdict=verdict)
        self._predict(step, seconds)
        self._own_work.begin()

    def _predict(self, step: int, seconds: float) -> None:
        """Say once how long the run will take, from its first steps but the very first, which warms up."""
        left = self._config.train.steps - step
        if step == self._start_step + 1 or not left or self._predicted:
            return
        self._first_steps.append(seconds)
        spent = sum(self._first_steps)
        if len(self._first_steps) == PREDICTING_STEPS or spent >= PREDICTING_SECONDS:
            self._predicted = True
            each = spent / len(self._first_steps)
            self._console.message(f"time      {left:,} more steps of {step_time(each)} take {duration(left * each)}")

    def _log(self, step: int, *, loss: float, lr: float, grad_norm: float, verdict: Verdict) -> None:
        now = time.perf_counter()
        seconds = (now - self._since - self._paused) / (step - self._logged_step)
        tokens_per_step = self._config.train.global_batch * self._config.model.block_size
        rate = tokens_per_step / seconds
        utilization = mfu(tokens_per_second=rate, flops_per_token=self._flops_per_token, peak_flops=self._peak_flops)
        figures = StepFigures(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            loss_z=verdict.loss_z,
            grad_norm_z=verdict.grad_norm_z,
            skipped=verdict.action == "skip",
            tokens=step * tokens_per_step,
            tokens_per_second=rate,
            mfu=utilization,
            seconds=seconds,
            memory_bytes=memory_bytes(self._runtime.device),
            data_wait=self._work.data_wait,
            checkpoint_stall=self._checkpoint_stall,
        )
        self._console.train(figures)
        if self._metrics is not None:
            self._metrics.train(figures)
            account = self._ledger.account()
            spent = {f"goodput/{part}_s": seconds for part, seconds in account.seconds.items()}
            self._metrics.scalars(step, {"goodput/share": account.goodput, **spent})
        if self._logged_step > self._start_step:  # the first step warms up
            self._compare_ranks(step, seconds=now - self._since)
        self._logged_step, self._since = step, now
        self._paused = self._checkpoint_stall = 0.0
        self._work = Work()

    def _compare_ranks(self, step: int, *, seconds: float) -> None:
        """Exchange what each rank did since the last log step; rank 0 names those that hold the others up.

        It also says how often to save, where that is for it to find out.
        """
        proposes = self._saves.auto and self._runtime.rank == 0
        proposal = self._save_cost.best_steps(self._between_failures()) if proposes else 0
        rows = gathered((*astuple(self._work), proposal), self._runtime)
        if self._saves.adopt(int(rows[0][-1])):
            self._say_save_interval(int(rows[0][-1]))
        if self._metrics is None or not self._runtime.distributed:
            return
        steps = step - self._logged_step
        for line in self._watch.add([Work(*row[:-1]) for row in rows], steps=steps, seconds=seconds):
            self._console.message(line)
            log.info(line)
        own = sorted(row[0] / steps for row in rows)
        longest_wait = max(row[1] / steps for row in rows)
        self._metrics.scalars(
            step,
            {
                "ranks/own_work_s_median": statistics.median(own),
                "ranks/own_work_s_longest": own[-1],
                "ranks/data_wait_s_longest": longest_wait,
            },
        )

    def _between_failures(self) -> float:
        """The seconds of training from one failure to the next that this run has to expect."""
        account = self._ledger.account()
        hosts = self._runtime.world_size // self._runtime.local_world_size
        trained = account.total - account.seconds["recovery"]
        return seconds_between_failures(seconds=trained, failures=account.failures, hosts=hosts)

    def _say_save_interval(self, steps: int) -> None:
        every = f"{steps:,} steps ({duration(steps * self._save_cost.of_a_step)})"
        self._console.message(
            f"checkpoints every {every}: a save costs {self._save_cost.of_a_save:.2f} s of training, "
            f"a failure is expected every {duration(self._between_failures())}"
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around what is not training: its time does not count in the steps'."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started
        self._ledger.spend("evaluation")
        self._write_ledger()
        self._own_work.begin()

    @contextmanager
    def checkpointing(self, step: int) -> Iterator[None]:
        """The same around a checkpoint after `step`, whose stall of training is logged."""
        started = time.perf_counter()
        if self._metrics is not None:
            self._metrics.sync()
        self._ledger.spend("other")  # a step that was broken off, if any
        yield
        stalled = time.perf_counter() - started
        self._saves.saved(step)
        self._save_cost.save(stalled)
        self._checkpoint_stall += stalled
        self._paused += stalled
        self._ledger.spend("checkpoint")
        self._write_ledger()
        self._own_work.begin()

    def evaluation(self, step: int, found: Evaluation, *, best: bool) -> None:
        """Log an evaluation, which found the lowest loss so far or not, and redraw the loss curve."""
        self._console.evaluation(
            step=step,
            val_loss=found.val_loss,
            val_perplexity=perplexity(found.val_loss),
            val_bits_per_byte=found.val_bits_per_byte,
            best=best,
        )
        if self._metrics is not None:
            self._metrics.evaluation(step=step, val_loss=found.val_loss, val_bits_per_byte=found.val_bits_per_byte)
            self._plot()

    def sample(self, step: int, text: str) -> None:
        """Log a text that the model wrote."""
        if self._metrics is not None:
            self._metrics.text("sample", text, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away and say where the time went."""
        self._console.close()
        if self._metrics is not None:
            self._ledger.spend("other")
            stopped: End = "interrupted" if isinstance(error, Interrupted) else "failed"
            self._write_ledger(end="done" if error is None else stopped)
            self._console.goodput(self._ledger.account())
            self._metrics.close()

    def _write_ledger(self, *, end: End | None = None) -> None:
        if self._metrics is not None:
            with self._metrics.counting_drops():
                self._ledger.write(end=end)

    def _is_logged(self, step: int) -> bool:
        # Where it is for the ranks to find out how often to save, a second step is the first that can tell.
        warming_up = step - self._start_step <= (2 if self._saves.auto else 1)
        return warming_up or step == self._config.train.steps or step % self._config.log.every == 0

    def _plot(self) -> None:
        try:
            plot_losses(self._paths.metrics, self._paths.plot, require_owned=self._require_owned)
        except StorageError as error:
            self._console.message(f"no new loss curve: {error}")


def _peak_of_all(runtime: Runtime, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of all ranks together; None if any rank's device is unknown."""
    peak = device_peak_flops(runtime.device, dtype)
    peaks = torch.tensor([peak or 0.0, float(peak is None)], dtype=torch.float64, device=runtime.device)
    total, unknown = sum_over_ranks(peaks, runtime).tolist()
    return None if unknown else float(total)
