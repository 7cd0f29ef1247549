"""Output of rank 0 during a run: one line for each log step, above a progress bar if there is a terminal."""

import math
import sys
import time
from collections.abc import MutableMapping
from typing import Any

from tqdm import tqdm

from distgpt.telemetry.goodput import Account
from distgpt.telemetry.metrics import StepFigures

# z-scores are shown from this value on. Normally distributed values reach it once in 370 steps.
MIN_SHOWN_Z = 3.0

BAR_FORMAT = "{percentage:3.0f}% |{bar}| {place}{postfix}"
# Without a bar, a step that takes longer than this prints how many micro-batches are done.
QUIET_SECONDS = 60.0
# The beginning of a sample is shown: lines, and characters of a line.
SAMPLE_LINES, SAMPLE_WIDTH = 8, 100


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A progress bar over steps that can also show a part of a step."""

    place = ""

    @property
    def format_dict(self) -> MutableMapping[str, Any]:
        return {**super().format_dict, "place": self.place}

    def move(self, step: int, done: int, count: int) -> None:
        """Show that `step` steps are done, and `done` of the `count` micro-batches of the next one."""
        self.place = f"{step}/{self.total}" + (f", micro-batch {done}/{count}" if count > 1 else "")
        self.n = step + done / count
        self.update(0)


class Console:
    """Print lines on stdout and a progress bar on stderr; print nothing unless `enabled`.

    The bar needs a terminal on both. Otherwise, for example in a job's log file, there are only the lines.
    """

    def __init__(self, total_steps: int, start_step: int, enabled: bool) -> None:
        self._total, self._done = total_steps, start_step
        self._enabled = enabled
        self._last_line = time.monotonic()
        self._bar: _Bar | None = None
        if enabled and sys.stdout.isatty() and sys.stderr.isatty():
            self._bar = _Bar(
                total=total_steps,
                initial=start_step,
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
                leave=False,
                miniters=0,
            )
            self._bar.move(start_step, 0, 1)

    def advance(self) -> None:
        """Count a finished step and move the bar."""
        self._done += 1
        if self._bar is not None:
            self._bar.move(self._done, 0, 1)

    def micro_batch(self, done: int, count: int) -> None:
        """Show that `done` of `count` micro-batches of this step are done: on the bar, or in a line now and then."""
        if self._bar is not None:
            self._bar.move(self._done, done, count)
        elif time.monotonic() - self._last_line > QUIET_SECONDS:
            self.message(f"{self._step(self._done + 1)} | micro-batch {done}/{count}")

    def train(self, figures: StepFigures) -> None:
        """Print the figures of a log step."""
        rate = f"{_with_suffix(figures.tokens_per_second)} tok/s"
        eta = f"eta {duration((self._total - figures.step) * figures.seconds)}"
        parts = [
            *(self._step(figures.step), f"loss {figures.loss:.4f}{_z_score(figures.loss_z)}"),
            *(f"lr {figures.lr:.2e}", f"norm {figures.grad_norm:.2f}{_z_score(figures.grad_norm_z)}"),
            *(step_time(figures.seconds), rate),
            *([] if figures.mfu is None else [f"mfu {figures.mfu:.1%}"]),
            eta,
            *(["update skipped"] if figures.skipped else []),
        ]
        self.message(" | ".join(parts))
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {figures.loss:.4f} | {rate} | {eta}")

    def evaluation(
        self, *, step: int, val_loss: float, val_perplexity: float, val_bits_per_byte: float | None, best: bool
    ) -> None:
        """Print the result of the evaluation after `step`. `best`: it is the lowest loss so far."""
        parts = [self._step(step), f"val loss {val_loss:.4f}", f"ppl {val_perplexity:.2f}"]
        parts += [] if val_bits_per_byte is None else [f"{val_bits_per_byte:.2f} bits/byte"]
        parts += ["best"] if best else []
        self.message(" | ".join(parts))

    def sample(self, step: int, text: str) -> None:
        """Print the beginning of a text that the model has generated, without characters that steer a terminal."""
        printable = "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text.expandtabs(4)
        )
        lines = [f"    {line[:SAMPLE_WIDTH]}" for line in printable.split("\n")[:SAMPLE_LINES]]
        self.message("\n".join([f"{self._step(step)} | sample, whole in samples.jsonl:", *lines]))

    def goodput(self, account: Account) -> None:
        """Print how the time of the run was spent, over all its attempts."""
        attempts = f" in {account.attempts} attempts" if account.attempts > 1 else ""
        parts = [f"{part.replace('_', ' ')} {_precise_duration(seconds)}" for part, seconds in account.seconds.items()]
        self.message(
            f"goodput   {account.goodput:.1%} of {_precise_duration(account.total)}{attempts}: {', '.join(parts)}"
        )

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

    def _step(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}"


def _z_score(z: float | None) -> str:
    return "" if z is None or abs(z) < MIN_SHOWN_Z else f" (z {z:+.1f})"


def duration(seconds: float) -> str:
    """Format seconds: 45s, 3m12s, 2h05m or 3d04h; ? if they are not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{smaller_unit}"
    return f"{whole}s"


def _precise_duration(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def step_time(seconds: float) -> str:
    """Format the seconds of a step: 45 ms, 12.3 s."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _with_suffix(number: float) -> str:
    """Format a number with about three digits: 950, 12.3k, 1.23M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.{2 - min(1, int(math.log10(number / size)))}f}{suffix}"
    return f"{number:.0f}"
