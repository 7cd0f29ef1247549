"""The figures of a run: metrics.jsonl, samples.jsonl and TensorBoard, written by rank 0.

A full disk never ends the run: figures that cannot be written are dropped, counted in `dropped` and reported once.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from distgpt.config import Config, to_dict, to_toml
from distgpt.errors import StorageError
from distgpt.telemetry.dashboard import evaluation_scalars, hyperparameters, layout, step_scalars, training_done
from distgpt.telemetry.owned_files import append_or_undo, open_for_appending
from distgpt.telemetry.step_lines import METRICS_FILE, SAMPLES_FILE, end_of_step
from distgpt.telemetry.tensorboard import EventFile

# Sections of the config that TensorBoard compares between runs.
LEARNING = ("model", "optim", "train")


@dataclass(frozen=True)
class StepFigures:
    """A training line of metrics.jsonl."""

    step: int
    loss: float  # mean over the global batch, in nats per token
    lr: float
    grad_norm: float
    loss_z: float | None  # standard deviations above the mean of the steps before, see health/outliers.py
    grad_norm_z: float | None
    skipped: bool  # the weights were not updated
    tokens: int  # since the start of the run
    tokens_per_second: float
    mfu: float | None  # 0 to 1
    seconds: float  # per step
    memory_bytes: int
    data_wait: float  # seconds since the last line
    checkpoint_stall: float  # seconds since the last line


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. `val_losses`: of each dataset, by name, if there are several."""

    val_loss: float  # nats per token
    val_bits_per_byte: float
    standard_error: float | None  # of the loss, over the windows; None for one window
    val_losses: Mapping[str, float] = field(default_factory=dict)


class Metrics:
    """Writer of metrics.jsonl, one JSON object per line, and of the TensorBoard directory tb/ of a run.

    Texts that the model generates are also written to samples.jsonl. Removes the lines after `resume_step` of both
    files, so that no step is logged twice after a resume. Calls `require_owned` before each write. Raises StorageError
    if metrics.jsonl cannot be opened.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, require_owned: Callable[[], object]) -> None:
        self.dropped = 0
        self._run_dir, self._resume_step, self._require_owned = run_dir, resume_step, require_owned
        try:
            self._file = self._open(METRICS_FILE)
        except OSError as error:
            raise StorageError(f"cannot write {run_dir / METRICS_FILE}: {error.strerror}") from error
        self._samples: int | None = None  # opened for the first text
        first_step = resume_step + 1 if resume_step else 0
        self._events = EventFile(run_dir / "tb", first_step=first_step, require_owned=require_owned)

    def train(self, figures: StepFigures) -> None:
        """Log the figures of a training step."""
        values = asdict(figures)
        self._write_line(values)
        self.scalars(figures.step, step_scalars(values))

    def evaluation(
        self, step: int, *, val_loss: float, val_bits_per_byte: float, val_losses: Mapping[str, float] | None = None
    ) -> None:
        """Log the evaluation after `step`. `val_losses`: of each dataset, if there are several."""
        values = {"loss": val_loss, "perplexity": perplexity(val_loss), "bits_per_byte": val_bits_per_byte}
        values |= {f"loss/{name}": loss for name, loss in (val_losses or {}).items()}
        self._write_line({"step": step, **{f"val_{name}": value for name, value in values.items()}})
        self.scalars(step, evaluation_scalars(values))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve in TensorBoard."""
        with self.counting_drops():
            self._events.scalars(step, values)

    def config(self, config: Config, step: int) -> None:
        """Show the config in TensorBoard, as text and as hyperparameters, and arrange its charts."""
        tree = to_dict(config)
        values = {f"{name}.{key}": value for name in LEARNING for key, value in tree[name].items()}
        self.text("config", to_toml(config), step)
        with self.counting_drops():
            self._events.summary(layout(), step)
            self._events.summary(hyperparameters(values, group=self._run_dir.resolve().name), step)

    def done(self, step: int) -> None:
        """Record in TensorBoard that the run has reached its last step."""
        with self.counting_drops():
            self._events.summary(training_done(), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Show `text` verbatim in TensorBoard."""
        with self.counting_drops():
            self._events.text(tag, text, step)

    def sample(self, step: int, text: str) -> None:
        """Log a text that the model has generated."""
        self.text("sample", text, step)
        with self.counting_drops():
            if self._samples is None:
                self._samples = self._open(SAMPLES_FILE)
            self._require_owned()
            append_or_undo(self._samples, json.dumps({"step": step, "text": text}).encode() + b"\n")

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk. A checkpoint needs the lines up to its step, also after a power failure."""
        with self.counting_drops():
            os.fsync(self._file)

    def close(self) -> None:
        """Close the files. Everything is already written."""
        self._events.close()
        os.close(self._file)
        if self._samples is not None:
            os.close(self._samples)

    def _open(self, name: str) -> int:
        """Open a file of JSON lines without those after resume_step, and return its descriptor."""
        return open_for_appending(
            self._run_dir / name,
            keep=lambda content: end_of_step(content, self._resume_step),
            require_owned=self._require_owned,
        )

    def _write_line(self, values: Mapping[str, float | None]) -> None:
        line = json.dumps({name: _finite_or_none(value) for name, value in values.items()})
        with self.counting_drops():
            self._require_owned()
            append_or_undo(self._file, line.encode() + b"\n")

    @contextmanager
    def counting_drops(self) -> Iterator[None]:
        """Catch and count OSErrors of the writes inside; report the first one on stderr."""
        try:
            yield
        except OSError as error:
            if not self.dropped:
                print(f"distgpt: metrics are being lost, training goes on: {error}", file=sys.stderr, flush=True)
            self.dropped += 1


def perplexity(loss: float) -> float:
    """Return e^loss for a loss in nats per token; infinity if that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def memory_bytes(device: torch.device) -> int:
    """Return the peak of the memory allocated on a GPU.

    For an Apple GPU, what is allocated now; for a CPU, the resident memory of this process now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        # macOS has no /proc; its getrusage gives the peak in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident_pages * resource.getpagesize()


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
