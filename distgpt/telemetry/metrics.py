"""What a run measured: metrics.jsonl and TensorBoard, written by rank 0.

A full disk costs figures, never the run: what cannot be written is dropped, counted in `dropped` and reported once.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distgpt.errors import StorageError
from distgpt.telemetry.tensorboard import EventFile, append_whole, put_in_place

METRICS_FILE = "metrics.jsonl"
GIB = 2**30


@dataclass(frozen=True)
class StepFigures:
    """A training line of metrics.jsonl."""

    step: int
    loss: float  # the global batch's mean, in nats per token
    lr: float
    grad_norm: float
    loss_z: float | None  # standard deviations above the mean of the last steps, see health/outliers.py
    grad_norm_z: float | None
    skipped: bool  # the update was left out
    tokens: int  # of the whole run
    tokens_per_second: float
    mfu: float | None  # 0 to 1
    seconds: float  # of one step
    memory_bytes: int
    data_wait: float  # seconds since the last line, as is the stall
    checkpoint_stall: float


class Metrics:
    """metrics.jsonl, one JSON object a line, and the TensorBoard directory tb/ of a run.

    On resume, what was logged after `resume_step` is removed, so that no step is logged twice. `require_owned` is
    called before each write. Raises StorageError if metrics.jsonl cannot be opened.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, require_owned: Callable[[], object]) -> None:
        self.dropped = 0
        self._require_owned = require_owned
        path = run_dir / METRICS_FILE
        try:
            require_owned()
            self._file = _cut_after(path, resume_step, require_owned)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        first_step = resume_step + 1 if resume_step else 0
        self._events = EventFile(run_dir / "tb", first_step=first_step, require_owned=require_owned)

    def train(self, figures: StepFigures) -> None:
        """Log training up to a step."""
        self._line(asdict(figures))
        self.scalars(
            figures.step,
            {
                "train/loss": figures.loss,
                "train/lr": figures.lr,
                "train/grad_norm": figures.grad_norm,
                "train/loss_z": figures.loss_z,
                "train/grad_norm_z": figures.grad_norm_z,
                "train/skipped": float(figures.skipped),
                "perf/tokens_per_second": figures.tokens_per_second,
                "perf/mfu": figures.mfu,
                "perf/step_s": figures.seconds,
                "perf/memory_gib": figures.memory_bytes / GIB,
                "perf/data_wait_s": figures.data_wait,
                "perf/checkpoint_stall_s": figures.checkpoint_stall,
            },
        )

    def evaluation(self, *, step: int, val_loss: float, val_bits_per_byte: float | None) -> None:
        """Log an evaluation after `step`; bits per byte are None where the tokenizer knows no bytes."""
        values = {"val_loss": val_loss, "val_perplexity": perplexity(val_loss)}
        if val_bits_per_byte is not None:
            values["val_bits_per_byte"] = val_bits_per_byte
        self._line({"step": step, **values})
        self.scalars(step, {name.replace("val_", "eval/"): value for name, value in values.items()})

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add points to curves in TensorBoard; None is left out."""
        with self.counting_drops():
            self._events.scalars(step, {tag: value for tag, value in values.items() if value is not None})

    def text(self, tag: str, text: str, step: int) -> None:
        """Show `text` verbatim in TensorBoard."""
        with self.counting_drops():
            self._events.text(tag, text, step)

    def sync(self) -> None:
        """Bring metrics.jsonl to disk: a checkpoint that is about to be saved relies on the lines up to its step."""
        with self.counting_drops():
            os.fsync(self._file)

    def close(self) -> None:
        """Close the files; everything is already written."""
        self._events.close()
        os.close(self._file)

    def _line(self, values: Mapping[str, float | None]) -> None:
        line = json.dumps({name: _finite(value) for name, value in values.items()})
        with self.counting_drops():
            self._require_owned()
            append_whole(self._file, line.encode() + b"\n")

    @contextmanager
    def counting_drops(self) -> Iterator[None]:
        """Around what writes telemetry: an OSError is counted, the first one told, and goes no further."""
        try:
            yield
        except OSError as error:
            if not self.dropped:
                print(f"distgpt: metrics are being lost, training goes on: {error}", file=sys.stderr, flush=True)
            self.dropped += 1


def perplexity(loss: float) -> float:
    """e^loss, of a loss in nats per token; infinity where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole. Raises StorageError."""
    try:
        return [values for values, _ in _whole_lines(file.read_bytes())]
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from error


def memory_bytes(device: torch.device) -> int:
    """The most that was ever allocated on a GPU; for a CPU, what this process holds in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        # No /proc on a Mac, which counts its peak in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident_pages * resource.getpagesize()


def _cut_after(path: Path, step: int, require_owned: Callable[[], object]) -> int:
    """Open metrics.jsonl without what follows its last whole line of `step` or an earlier one; empty if `step` is 0.

    Steps only ever grow from line to line, so this is all that a run from `step` will write again. It becomes a new
    file, see `put_in_place`. Where a full disk has no room for a copy the file itself is cut.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with open(os.dup(file), "rb") as lines:
        content = lines.read()
    kept = [line_end for values, line_end in _whole_lines(content) if values["step"] <= step]
    end = kept[-1] if step and kept else 0
    try:
        copy = put_in_place(path, content[:end], require_owned=require_owned)
    except OSError:
        require_owned()
        os.ftruncate(file, end)
        os.fsync(file)
        return file
    os.close(file)
    return copy


def _whole_lines(content: bytes) -> list[tuple[dict[str, Any], int]]:
    """The objects of the lines that are not torn or damaged, each with the offset in bytes where its line ends."""
    found: list[tuple[dict[str, Any], int]] = []
    end = 0
    for line in content.splitlines(keepends=True):
        end += len(line)
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append((values, end))
    return found


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
