"""The progress of one run: time its steps, and pass what was measured to the console and to files."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from distgpt.config import Config, to_toml
from distgpt.distributed.plan import Plan
from distgpt.errors import Interrupted, StorageError
from distgpt.health.outliers import Decision
from distgpt.run.paths import RunPaths
from distgpt.telemetry.console import Console, duration, step_time
from distgpt.telemetry.goodput import Account, End, Ledger
from distgpt.telemetry.metrics import Metrics, StepFigures, memory_bytes, perplexity
from distgpt.telemetry.peaks import mfu
from distgpt.telemetry.plots import plot_losses

# The duration of a run is predicted after so many steps or seconds.
PREDICTING_STEPS, PREDICTING_SECONDS = 3, 20.0


class Progress:
    """Shows and records the progress of a run. Every rank has one; only that of rank 0 prints and writes."""

    def __init__(
        self,
        paths: RunPaths,
        *,
        config: Config,
        plan: Plan,
        flops_per_token: float,
        peak_flops: float | None,
        start_step: int,
        require_owned: Callable[[], object],
    ) -> None:
        """`peak_flops`: of all devices together, per second; None if unknown.

        `require_owned` is called before each write to the run directory, see `RunSession.require_owned`.
        """
        self._paths, self._config, self._plan = paths, config, plan
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        is_rank_zero = plan.runtime.rank == 0
        self._require_owned = require_owned
        self._metrics = (
            Metrics(paths.root, resume_step=start_step, require_owned=require_owned) if is_rank_zero else None
        )
        ledger = paths.goodput if is_rank_zero else None
        self._ledger = Ledger(ledger, start_step=start_step, require_owned=require_owned)
        self._console = Console(config.train.steps, start_step, is_rank_zero)
        self._start_step = self._logged_step = start_step
        self._since = time.perf_counter()
        self._paused = self._checkpoint_stall = self._data_wait = 0.0
        self._first_steps: list[float] = []
        self._ended: dict[int, float] = {}  # when each step ended, for those that are logged later
        self._predicted = False
        if self._metrics is not None:
            self._metrics.text("config", to_toml(config), start_step)
        self._write_ledger()

    def micro_batch(self, done: int, count: int) -> None:
        """Show that `done` of `count` micro-batches of this rank are done in the current step."""
        self._console.micro_batch(done, count)

    def step_done(self, step: int, *, data_wait: float) -> float:
        """Record a finished optimizer step and return its seconds. `data_wait`: seconds of it spent on data."""
        self._console.advance()
        self._ended[step] = time.perf_counter()
        seconds = self._ledger.step(step, data_wait=data_wait)
        self._data_wait += data_wait
        self._write_ledger()
        return seconds

    def is_logged(self, step: int) -> bool:
        """Tell whether a step is logged: every log.every steps, and the first and the last one."""
        # With checkpoint.every=auto, ranks choose the interval at log steps, from the second step on.
        warm_up = 2 if self._config.checkpoint.every == "auto" else 1
        warming_up = step - self._start_step <= warm_up
        return warming_up or step == self._config.train.steps or step % self._config.log.every == 0

    def log(self, step: int, *, loss: float, lr: float, grad_norm: float, decision: Decision) -> float:
        """Log a step. Returns the seconds since the previous logged step."""
        now = self._ended.get(step) or time.perf_counter()
        self._ended = {later: end for later, end in self._ended.items() if later > step}
        elapsed = now - self._since
        seconds = (elapsed - self._paused) / (step - self._logged_step)
        tokens_per_step = self._config.train.global_batch * self._config.model.block_size
        rate = tokens_per_step / seconds
        utilization = mfu(tokens_per_second=rate, flops_per_token=self._flops_per_token, peak_flops=self._peak_flops)
        figures = StepFigures(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            loss_z=decision.loss_z,
            grad_norm_z=decision.grad_norm_z,
            skipped=decision.action == "skip",
            tokens=step * tokens_per_step,
            tokens_per_second=rate,
            mfu=utilization,
            seconds=seconds,
            memory_bytes=memory_bytes(self._plan.runtime.device),
            data_wait=self._data_wait,
            checkpoint_stall=self._checkpoint_stall,
        )
        self._console.train(figures)
        if self._metrics is not None:
            self._metrics.train(figures)
            account = self.account()
            spent = {f"goodput/{part}_s": part_seconds for part, part_seconds in account.seconds.items()}
            self._metrics.scalars(step, {"goodput/share": account.goodput, **spent})
        self._logged_step, self._since = step, now
        self._paused = self._checkpoint_stall = self._data_wait = 0.0
        return elapsed

    def compare_ranks(self, step: int, messages: Sequence[str], figures: Mapping[str, float]) -> None:
        """Show messages about ranks, and record figures, by name, under ranks/ in TensorBoard."""
        for line in messages:
            self._console.message(line)
        if self._metrics is not None:
            self._metrics.scalars(step, {f"ranks/{name}": value for name, value in figures.items()})

    def save_interval(self, steps: int, *, step_seconds: float, cost: float, between_failures: float) -> None:
        """Show the new save interval, and the reasons for it. Costs and times in seconds."""
        self._console.message(
            f"checkpoints every {steps:,} steps ({duration(steps * step_seconds)}): a save costs {cost:.2f} s of "
            f"training, a failure is expected every {duration(between_failures)}"
        )

    def predict(self, step: int, seconds: float) -> None:
        """Show once how long the run will take, from its first steps, except the very first, which warms up."""
        left = self._config.train.steps - step
        if step == self._start_step + 1 or not left or self._predicted:
            return
        self._first_steps.append(seconds)
        spent = sum(self._first_steps)
        if len(self._first_steps) == PREDICTING_STEPS or spent >= PREDICTING_SECONDS:
            self._predicted = True
            mean = spent / len(self._first_steps)
            self._console.message(f"time      {left:,} more steps of {step_time(mean)} take {duration(left * mean)}")

    def account(self) -> Account:
        """Return the account of the time of the run so far, over all its attempts."""
        return self._ledger.account()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Wrap an evaluation, so that its time does not count as time of steps."""
        started = time.perf_counter()
        yield
        self._paused += time.perf_counter() - started
        self._ledger.spend("evaluation")
        self._write_ledger()

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Wrap the part of a save for which training stops, so that its time is logged."""
        started = time.perf_counter()
        if self._metrics is not None:
            self._metrics.sync()
        self._ledger.spend("other")  # an unfinished step, if any
        yield
        stalled = time.perf_counter() - started
        self._checkpoint_stall += stalled
        self._paused += stalled
        self._ledger.spend("checkpoint")
        self._write_ledger()

    def evaluation(self, step: int, *, val_loss: float, val_bits_per_byte: float, best: bool) -> None:
        """Log an evaluation and redraw the loss curve. `best`: its loss is the lowest so far."""
        self._console.evaluation(
            step=step,
            val_loss=val_loss,
            val_perplexity=perplexity(val_loss),
            val_bits_per_byte=val_bits_per_byte,
            best=best,
        )
        if self._metrics is not None:
            self._metrics.evaluation(step=step, val_loss=val_loss, val_bits_per_byte=val_bits_per_byte)
            self._plot()

    def sample(self, step: int, text: str) -> None:
        """Log a text that the model has generated."""
        if self._metrics is not None:
            self._metrics.text("sample", text, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the progress bar and show where the time went."""
        self._console.close()
        if self._metrics is not None:
            self._ledger.spend("other")
            stopped: End = "interrupted" if isinstance(error, Interrupted) else "failed"
            self._write_ledger(end="done" if error is None else stopped)
            self._console.goodput(self.account())
            self._metrics.close()

    def _write_ledger(self, *, end: End | None = None) -> None:
        if self._metrics is not None:
            with self._metrics.counting_drops():
                self._ledger.write(end=end)

    def _plot(self) -> None:
        try:
            plot_losses(self._paths.metrics, self._paths.plot, require_owned=self._require_owned)
        except StorageError as error:
            self._console.message(f"the loss curve was not redrawn: {error}")
