"""What rank 0 says while a run goes on: one line each log step, above a progress bar where there is a terminal."""

import math
import sys

from tqdm import tqdm

from distgpt.telemetry.goodput import Account
from distgpt.telemetry.metrics import StepFigures

# z-scores are shown from here on: of plain noise it is one in 370.
SHOWN_Z = 3.0

BAR_FORMAT = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"


class Console:
    """Lines on stdout and a bar on stderr; silent unless `enabled`.

    Without a terminal on both, as in a job's log file, there are only the lines.
    """

    def __init__(self, total_steps: int, start_step: int, enabled: bool) -> None:
        self._total = total_steps
        self._enabled = enabled
        self._bar: tqdm | None = None
        if enabled and sys.stdout.isatty() and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=start_step, bar_format=BAR_FORMAT, dynamic_ncols=True, leave=False
            )

    def advance(self) -> None:
        """Move the bar on by a step."""
        if self._bar is not None:
            self._bar.update()

    def train(self, figures: StepFigures) -> None:
        """Say how training goes."""
        rate = f"{_short(figures.tokens_per_second)} tok/s"
        eta = f"eta {duration((self._total - figures.step) * figures.seconds)}"
        parts = [
            *(self._step(figures.step), f"loss {figures.loss:.4f}{_outlier(figures.loss_z)}"),
            *(f"lr {figures.lr:.2e}", f"norm {figures.grad_norm:.2f}{_outlier(figures.grad_norm_z)}"),
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
        """Say what the evaluation after `step` found; `best`: it is the lowest loss so far."""
        parts = [self._step(step), f"val loss {val_loss:.4f}", f"ppl {val_perplexity:.2f}"]
        parts += [] if val_bits_per_byte is None else [f"{val_bits_per_byte:.2f} bits/byte"]
        parts += ["best"] if best else []
        self.message(" | ".join(parts))

    def goodput(self, account: Account) -> None:
        """Say where the time of the run went, all its attempts together."""
        attempts = f" in {account.attempts} attempts" if account.attempts > 1 else ""
        parts = [f"{part.replace('_', ' ')} {_span(seconds)}" for part, seconds in account.seconds.items()]
        self.message(f"goodput   {account.goodput:.1%} of {_span(account.total)}{attempts}: {', '.join(parts)}")

    def message(self, text: str) -> None:
        """A line of its own."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away; the lines stay."""
        if self._bar is not None:
            self._bar.close()

    def _step(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}"


def _outlier(z: float | None) -> str:
    return "" if z is None or abs(z) < SHOWN_Z else f" (z {z:+.1f})"


def duration(seconds: float) -> str:
    """45s, 3m12s, 2h05m or 3d04h; ? for what is no time."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{smaller_unit}"
    return f"{whole}s"


def _span(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 60 else duration(seconds)


def step_time(seconds: float) -> str:
    """45 ms, 12.3 s."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _short(number: float) -> str:
    """Three digits or so: 950, 12.3k, 1.23M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.{2 - min(1, int(math.log10(number / size)))}f}{suffix}"
    return f"{number:.0f}"
