"""Output of rank 0 during a run: one line for each log step, above a progress bar if there is a terminal."""

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from tqdm import tqdm

from distgpt.telemetry.goodput import TimeSpent
from distgpt.telemetry.metrics import StepFigures, perplexity
from distgpt.units import duration
from distgpt.usage import columns, wrapped

# z-scores are shown from this value on. Normally distributed values reach it once in 370 steps.
MIN_SHOWN_Z = 3.0

BAR_FORMAT = "{percentage:3.0f}% |{bar}| {desc}{postfix}"
# Without a bar, a step that takes longer than this prints how many micro-batches are done.
QUIET_SECONDS = 60.0
# The beginning of a sample is shown: lines, and their indentation.
SAMPLE_LINES, INDENT = 8, " " * 4


class Console:
    """Print lines on stdout and a progress bar on stderr; print nothing unless `enabled`.

    The bar needs a terminal on both. Otherwise, for example in a job's log file, there are only the lines.
    """

    def __init__(self, total_steps: int, start_step: int, enabled: bool) -> None:
        self._total, self._done = total_steps, start_step
        self._enabled = enabled
        self._left_out = 0  # of the parts of a line for which there is no room
        self._last_line = time.monotonic()
        self._bar: Any = None
        if enabled and sys.stdout.isatty() and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, bar_format=BAR_FORMAT, dynamic_ncols=True, leave=False, miniters=0)
            self._move_bar(0, 1)

    def advance(self) -> None:
        """Count a finished step and move the bar."""
        self._done += 1
        if self._bar is not None:
            self._move_bar(0, 1)

    def micro_batch(self, done: int, count: int) -> None:
        """Show that `done` of `count` micro-batches of this step are done: on the bar, or in a line now and then."""
        if self._bar is not None:
            self._move_bar(done, count)
        elif time.monotonic() - self._last_line > QUIET_SECONDS:
            self._row(self._done + 1, f"micro-batch {done}/{count}")

    def train(self, figures: StepFigures) -> None:
        """Print the figures of a log step, without some where the terminal is too narrow for all."""
        rate = f"{tqdm.format_sizeof(figures.tokens_per_second)} tok/s"
        eta = f"eta {duration((self._total - figures.step) * figures.seconds)}"
        parts = [
            f"loss {figures.loss:.4f}{_z_score(figures.loss_z)}",
            lr := f"lr {figures.lr:.2e}",
            f"norm {figures.grad_norm:.2f}{_z_score(figures.grad_norm_z)}",
            milliseconds := step_time(figures.seconds),
            rate,
            mfu := "" if figures.mfu is None else f"mfu {figures.mfu:.1%}",
            eta,
            "update skipped" if figures.skipped else "",
        ]
        # What was left out once stays away, so that lines are alike.
        for number, least in enumerate((milliseconds, lr, mfu)):
            if number < self._left_out or len(self._line(figures.step, parts)) > columns():
                self._left_out = max(self._left_out, number + 1)
                parts.remove(least)
        self.message(self._line(figures.step, parts))
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {figures.loss:.4f} | {rate} | {eta}")

    def evaluation(self, step: int, *, val_loss: float, val_bits_per_byte: float, best: bool) -> None:
        """Print the result of the evaluation after `step`. `best`: it is the lowest loss so far."""
        bits, shown_best = f"{val_bits_per_byte:.2f} bits/byte", "best" if best else ""
        self._row(step, f"val loss {val_loss:.4f}", f"ppl {perplexity(val_loss):.2f}", bits, shown_best)

    def losses_of_datasets(self, step: int, val_losses: Mapping[str, float]) -> None:
        """Print the validation loss of each dataset of a mix."""
        self._row(step, *(f"{name} {loss:.4f}" for name, loss in val_losses.items()))

    def sample(self, step: int, text: str) -> None:
        """Print the beginning of a text that the model has generated, without characters that steer a terminal."""
        printable = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4)
        )
        lines = [(INDENT + line)[: columns()] for line in printable.split("\n")[:SAMPLE_LINES]]
        self._row(step, "\n".join(["sample, whole in samples.jsonl:", *lines]))

    def goodput(self, spent: TimeSpent) -> None:
        """Print how the time of the run was spent, over all its attempts, without the parts that took none."""
        attempts = f" in {spent.attempts} attempts" if spent.attempts > 1 else ""
        shown = {part.replace("_", " "): _precise_duration(seconds) for part, seconds in spent.seconds.items()}
        parts = ", ".join(f"{part} {text}" for part, text in shown.items() if text != "0.0s")
        self.message(wrapped(f"goodput   {spent.goodput:.1%} of {_precise_duration(spent.total)}{attempts}: {parts}"))

    def message(self, text: str) -> None:
        """Print a line."""
        self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        """Remove the bar; the lines stay."""
        if self._bar is not None:
            self._bar.close()

    def _move_bar(self, done: int, count: int) -> None:
        """Show that `done` of `count` micro-batches of this step are done."""
        place = f"{self._done}/{self._total}" + (f", micro-batch {done}/{count}" if count > 1 else "")
        self._bar.set_description_str(place, refresh=False)
        self._bar.n = self._done + done / count
        self._bar.update(0)

    def _row(self, step: int, *parts: str) -> None:
        self.message(self._line(step, parts))

    def _line(self, step: int, parts: Iterable[str]) -> str:
        """Return a line about a step, of those parts that are not empty."""
        return " | ".join([f"step {step:>{len(str(self._total))}}/{self._total}", *filter(None, parts)])


def _z_score(z: float | None) -> str:
    return "" if z is None or abs(z) < MIN_SHOWN_Z else f" (z {z:+.1f})"


def _precise_duration(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def step_time(seconds: float) -> str:
    """Format the seconds of a step: 45 ms, 12.3 s."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
