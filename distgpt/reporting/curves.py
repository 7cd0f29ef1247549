"""Curves of a run over its steps, with few enough points for a page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distgpt.telemetry.plots import Floats, series, smooth

# A curve with more points than this is thinned to the lowest and highest value of each of half as many stretches.
MAX_POINTS = 1000

Curve = dict[str, list[float]]


def points(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[Floats, Floats]:
    """Return the steps and the finite values of a figure of metrics.jsonl."""
    return series([line for line in lines if type(line.get(name)) in (int, float) and math.isfinite(line[name])], name)


def curve(lines: Sequence[Mapping[str, Any]], name: str, *, scale: float = 1.0, smoothed: bool = False) -> Curve:
    """Return the steps ("x") of a figure, and its values ("y") to six digits."""
    steps, values = points(lines, name)
    values = smooth(values) if smoothed and len(values) else values
    kept = _extremes(values)
    return {"x": steps[kept].tolist(), "y": [float(f"{value * scale:.6g}") for value in values[kept].tolist()]}


def _extremes(values: Floats) -> NDArray[np.intp]:
    """Return the places of the values to show: all, or the first, the last and the extremes of each stretch."""
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    kept = {0, len(values) - 1}
    for places in np.array_split(np.arange(len(values)), MAX_POINTS // 2):
        kept |= {int(places[np.argmin(values[places])]), int(places[np.argmax(values[places])])}
    return np.array(sorted(kept))
