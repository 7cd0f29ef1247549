"""A plot of the loss curves of a run."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distgpt.errors import StorageError
from distgpt.telemetry.owned_files import replace_file
from distgpt.telemetry.step_lines import read_lines

Floats = NDArray[np.float64]

BLUE, ORANGE, GREY = "#3b6fb6", "#d9662b", "#6b7280"

# The smoothed curve averages over this share of the run on both sides of a step.
SMOOTHING = 1 / 50


def plot_losses(metrics_file: Path, picture: Path, *, require_owned: Callable[[], object]) -> None:
    """Draw training and validation loss over the steps and replace the PNG `picture`. Raises StorageError.

    `require_owned` is called before the file is replaced.
    """
    # Imported here because it is slow to import. A Figure needs no pyplot, which keeps global state.
    from matplotlib.figure import Figure

    lines = read_lines(metrics_file)
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = series(lines, "loss")
    if len(steps):
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(losses), color=BLUE, linewidth=1.8, marker=marker, label="training (smoothed)")
    steps, losses = series(lines, "val_loss")
    if len(steps):
        axes.plot(steps, losses, color=ORANGE, linewidth=1.2, marker="o", markersize=4.5, label="validation", zorder=3)
        above: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "horizontalalignment": "right"}
        axes.annotate(f"{losses[-1]:.4f}", (steps[-1], losses[-1]), color=ORANGE, fontweight="bold", **above)
    _add_labels(axes, title=metrics_file.resolve().parent.name)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        os.close(replace_file(picture, png.getvalue(), require_owned=require_owned))
    except OSError as error:
        raise StorageError(f"cannot write {picture}: {error.strerror}") from error


def smooth(values: Sequence[float] | NDArray[np.floating]) -> Floats:
    """Return the mean over a window centred on each value. Near both ends the window is narrower, to stay centred."""
    count = len(values)
    index = np.arange(count)
    half = np.minimum(round(count * SMOOTHING), np.minimum(index, count - 1 - index))
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    means: Floats = (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)
    return means


def series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[Floats, Floats]:
    """Return the steps and values of the lines that have this figure. A null stands for NaN or infinity: no point."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _add_labels(axes: Any, *, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no losses logged yet", transform=axes.transAxes, ha="center", color=GREY)
