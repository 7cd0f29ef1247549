"""The progress of a run: times its steps, and shows and records what was measured."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self

from distgpt.config import Config
from distgpt.distributed.plan import Plan
from distgpt.errors import Interrupted, StorageError
from distgpt.health.outliers import Decision
from distgpt.run.session import RunSession
from distgpt.telemetry.console import Console, step_time
from distgpt.telemetry.dashboard import GOODPUT
from distgpt.telemetry.goodput import End, Goodput
from distgpt.telemetry.metrics import Evaluation, Metrics, StepFigures, memory_bytes
from distgpt.telemetry.plots import plot_losses
from distgpt.units import duration
from distgpt.usage import wrapped

# Steps, or seconds of steps, after which the duration of a run is predicted: whichever comes first.
PREDICTING_STEPS, PREDICTING_SECONDS = 3, 20.0
# Steps after which a run is compared with its plan.
GRADED_STEPS = 20


class Progress:
    """Shows and records the progress of a run. Every rank has one; only that of rank 0 prints and writes."""

    def __init__(
        self,
        session: RunSession,
        config: Config,
        plan: Plan,
        *,
        start_step: int,
        peak_tokens_per_second: float | None,
        grade: Callable[[float], str | None] | None = None,
    ) -> None:
        """`peak_tokens_per_second`: the rate at an MFU of 1 on all devices together; None if unknown.

        `grade` gets the median seconds of the first steps and may return a line that compares them with the plan.
        """
        self._paths, self._require_owned = session.paths, session.require_owned
        self._config, self._device = config, plan.runtime.device
        self._tokens_per_step = config.train.global_batch * config.model.block_size
        self._peak_tokens_per_second = peak_tokens_per_second
        writes = plan.runtime.rank == 0
        self._metrics = (
            Metrics(self._paths.root, resume_step=start_step, require_owned=self._require_owned) if writes else None
        )
        path = self._paths.goodput if writes else None
        self.goodput = Goodput(path, start_step=start_step, require_owned=self._require_owned)
        self._console = Console(config.train.steps, start_step, writes)
        self._start_step = self._logged_step = start_step
        self._since = time.perf_counter()
        self._paused = self._checkpoint_stall = self._data_wait = 0.0
        self._first_steps: list[float] = []
        self._ended: dict[int, float] = {}  # when each step ended, for those that are logged later
        self._predicted = False
        self._draws = importlib.util.find_spec("matplotlib") is not None
        self._grade = grade
        self._graded_seconds: list[float] = []
        if self._metrics is not None:
            self._metrics.config(config, start_step)
            if not self._draws:
                self._console.message("no loss curve is drawn without the package matplotlib: pip install matplotlib")
        self._write_goodput()

    def micro_batch(self, done: int, count: int) -> None:
        """Show that `done` of `count` micro-batches of this rank are done in the current step."""
        self._console.micro_batch(done, count)

    def step_done(self, step: int, *, data_wait: float) -> float:
        """Record a finished optimizer step and return its seconds. `data_wait`: seconds of it spent on data."""
        self._console.advance()
        self._ended[step] = time.perf_counter()
        seconds = self.goodput.step(step, data_wait=data_wait)
        self._data_wait += data_wait
        self._write_goodput()
        if 1 < step - self._start_step <= GRADED_STEPS:  # the first step warms up
            self._graded_seconds.append(seconds)
        if step == self._start_step + GRADED_STEPS and self._grade and self._metrics is not None:
            line = self._grade(statistics.median(self._graded_seconds))
            if line is not None:
                self._console.message(line)
        return seconds

    def is_logged(self, step: int) -> bool:
        """Tell whether a step is logged: every log.every steps, and the first and the last one."""
        # With checkpoint.every=auto, ranks choose the save interval at log steps, from the second step on.
        warm_up = 2 if self._config.checkpoint.every == "auto" else 1
        warming_up = step - self._start_step <= warm_up
        return warming_up or step == self._config.train.steps or step % self._config.log.every == 0

    def log(self, step: int, *, loss: float, lr: float, grad_norm: float, decision: Decision) -> float:
        """Log a step. Returns the seconds since the previous logged step."""
        now = self._ended.get(step) or time.perf_counter()
        self._ended = {later: end for later, end in self._ended.items() if later > step}
        elapsed = now - self._since
        seconds = (elapsed - self._paused) / (step - self._logged_step)
        rate, peak = self._tokens_per_step / seconds, self._peak_tokens_per_second
        figures = StepFigures(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            loss_z=decision.loss_z,
            grad_norm_z=decision.grad_norm_z,
            skipped=decision.action == "skip",
            tokens=step * self._tokens_per_step,
            tokens_per_second=rate,
            mfu=None if peak is None else rate / peak,
            seconds=seconds,
            memory_bytes=memory_bytes(self._device),
            data_wait=self._data_wait,
            checkpoint_stall=self._checkpoint_stall,
        )
        self._console.train(figures)
        if self._metrics is not None:
            self._metrics.train(figures)
            spent = self.goodput.so_far()
            parts = {f"time/{part}_s": part_seconds for part, part_seconds in spent.seconds.items()}
            self._metrics.scalars(step, {GOODPUT: 100 * spent.goodput, **parts})
        self._logged_step, self._since = step, now
        self._paused = self._checkpoint_stall = self._data_wait = 0.0
        return elapsed

    def rank_comparison(self, step: int, messages: Sequence[str], figures: Mapping[str, float]) -> None:
        """Show messages about slow ranks, and record figures by name, under ranks/ in TensorBoard."""
        for line in messages:
            self._console.message(wrapped(line))
        if self._metrics is not None:
            self._metrics.scalars(step, {f"ranks/{name}": value for name, value in figures.items()})

    def save_interval(self, steps: int, *, step_seconds: float, cost: float, between_failures: float) -> None:
        """Show the new save interval, and the reasons for it. Costs and times in seconds."""
        line = (
            f"checkpoints every {steps:,} steps ({duration(steps * step_seconds)}): a save costs {cost:.2f} s of "
            f"training, a failure is expected every {duration(between_failures)}"
        )
        self._console.message(wrapped(line))

    def predict(self, step: int, seconds: float) -> None:
        """Show once how long the run will take, from its first steps without the very first, which warms up."""
        left = self._config.train.steps - step
        if step == self._start_step + 1 or not left or self._predicted:
            return
        self._first_steps.append(seconds)
        spent = sum(self._first_steps)
        if len(self._first_steps) == PREDICTING_STEPS or spent >= PREDICTING_SECONDS:
            self._predicted = True
            mean = spent / len(self._first_steps)
            self._console.message(f"time      {left:,} more steps of {step_time(mean)} take {duration(left * mean)}")

    @contextmanager
    def pausing(self, part: Literal["evaluation", "checkpoint", "other"]) -> Iterator[None]:
        """Wrap an evaluation, the part of a save that training waits for, or other work: none of it counts as steps."""
        started = time.perf_counter()
        if part == "checkpoint":
            if self._metrics is not None:
                self._metrics.sync()
            self.goodput.charge("other")  # an unfinished step, if any
        yield
        paused = time.perf_counter() - started
        self._paused += paused
        if part == "checkpoint":
            self._checkpoint_stall += paused
        self.goodput.charge(part)
        self._write_goodput()

    def evaluation(self, step: int, result: Evaluation, *, best: bool) -> None:
        """Log an evaluation and redraw the loss curve. `best`: the loss is the lowest so far."""
        figures = {"val_loss": result.val_loss, "val_bits_per_byte": result.val_bits_per_byte}
        self._console.evaluation(step, **figures, best=best)
        if result.val_losses:
            self._console.losses_of_datasets(step, result.val_losses)
        if self._metrics is not None:
            self._metrics.evaluation(step, **figures, val_losses=result.val_losses)
            if not self._draws:
                return
            try:
                plot_losses(self._paths.metrics, self._paths.plot, require_owned=self._require_owned)
            except StorageError as error:
                self._console.message(f"the loss curve was not redrawn: {error}")

    def sample(self, step: int, text: str) -> None:
        """Log a text that the model has generated."""
        self._console.sample(step, text)
        if self._metrics is not None:
            self._metrics.sample(step, text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the progress bar and show where the time went."""
        self._console.close()
        if self._metrics is not None:
            self.goodput.charge("other")
            stopped: End = "interrupted" if isinstance(error, Interrupted) else "failed"
            self._write_goodput(end="done" if error is None else stopped)
            self._console.goodput(self.goodput.so_far())
            if error is None:
                self._metrics.done(self._config.train.steps)
            self.goodput.close()
            self._metrics.close()

    def _write_goodput(self, *, end: End | None = None) -> None:
        if self._metrics is not None:
            with self._metrics.counting_drops():
                self.goodput.write(end=end)
