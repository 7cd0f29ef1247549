"""The page: assets/page.html, filled with the records of runs.

Text from files is escaped. A policy in the page lets a browser run only the page's own two scripts.
"""

import base64
import hashlib
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from distgpt import __version__
from distgpt.config import Config, to_dict
from distgpt.reporting.curves import Curve, curve, points
from distgpt.reporting.record import RunRecord
from distgpt.reporting.timeline import timeline
from distgpt.telemetry.goodput import TimeSpent, time_spent
from distgpt.units import duration, scaled_text, size_text

ASSETS = Path(__file__).parent / "assets"
GIB = 2**30
# Figures of metrics.jsonl, each with its title, unit and scale, and whether it varies so much that it is smoothed.
CHARTS = (
    ("lr", "Learning rate", "", 1, False),
    ("grad_norm", "Gradient norm", "before clipping", 1, True),
    ("tokens_per_second", "Throughput", "tokens/s", 1, True),
    ("mfu", "MFU", "% of the devices' peak", 100, True),
    ("seconds", "Time of a step", "ms", 1000, True),
    ("memory_bytes", "Memory of rank 0", "GiB", 1 / GIB, False),
)
SHOWN_FIGURES = ("loss", "tokens", "tokens_per_second", "mfu")
# The validation loss, and that of each dataset of several.
VALIDATION = re.compile("val_loss(/|$)")
# Samples that are shown, spread evenly over the run.
MAX_SAMPLES = 8
# Parts of the time below this share are not listed.
NEGLIGIBLE = 0.0005
# Keys that say where a run is, not how it trains.
PLACE_KEYS = ("run.dir", "run.fresh")


def build_page(runs: Sequence[RunRecord]) -> str:
    """Return the HTML of a page about one run, or one that compares several."""
    names = names_of(runs)
    scripts = [(ASSETS / name).read_text(encoding="utf-8") for name in ("uPlot.iife.min.js", "page.js")]
    styles = [(ASSETS / name).read_text(encoding="utf-8") for name in ("uPlot.min.css", "page.css")]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": _time, "size": size_text, "clock": _clock, "percent": "{:.4%}".format}
    return environment.from_string((ASSETS / "page.html").read_text(encoding="utf-8")).render(
        title=" and ".join(names) if len(names) < 3 else f"{len(names)} runs",
        runs=[_run(record, name) for record, name in zip(runs, names, strict=True)],
        charts=[_loss_chart(runs, names), *_charts(runs, names)],
        keys=_keys(runs),
        scripts=[Markup(script) for script in scripts],
        script_hashes=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        license=Markup((ASSETS / "uPlot.LICENSE").read_text(encoding="utf-8")),
        styles=[Markup(style) for style in styles],
        version=__version__,
        now=time.time(),
    )


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run: that of its directory, or its whole path if two have the same name."""
    count = Counter(run.name for run in runs)
    return [run.name if count[run.name] == 1 else str(run.path) for run in runs]


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _time(seconds: float) -> str:
    return f"{seconds:.1f}s" if 0 < seconds < 10 else duration(seconds)


def _clock(seconds: float) -> str:
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z") if seconds else "unknown"
    return "unknown"


def _loss_chart(runs: Sequence[RunRecord], names: Sequence[str]) -> dict[str, Any]:
    curves = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        label = "" if len(runs) == 1 else f"{name}, "
        curves += _smoothed(run, "loss", f"{label}training", number)
        for figure in dict.fromkeys(name for line in run.metrics for name in line if VALIDATION.match(name)):
            kind = figure.replace("val_loss", "validation", 1).replace("/", " on ", 1)
            curves.append(_style(curve(run.metrics, figure), f"{label}{kind}", number, "points"))
    return {
        "title": "Loss",
        "unit": "nats per token",
        "tall": True,
        "curves": [drawn for drawn in curves if drawn["x"]],
    }


def _charts(runs: Sequence[RunRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a chart for each figure that a run has."""
    charts = []
    for figure, title, unit, scale, varies in CHARTS:
        drawn = []
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            label = name if len(runs) > 1 else title
            if varies:
                drawn += _smoothed(run, figure, label, number, scale=scale)
            else:
                drawn.append(_style(curve(run.metrics, figure, scale=scale), label, number, "line"))
        if drawn := [one for one in drawn if one["x"]]:
            charts.append({"title": title, "unit": unit, "tall": False, "curves": drawn})
    return charts


def _smoothed(run: RunRecord, figure: str, label: str, number: int, *, scale: float = 1) -> list[dict[str, Any]]:
    """Return a figure as it was logged, drawn faintly, and smoothed."""
    return [
        _style(curve(run.metrics, figure, scale=scale), f"{label}, each step", number, "faint"),
        _style(curve(run.metrics, figure, scale=scale, smoothed=True), label, number, "line"),
    ]


def _style(points: Curve, label: str, run: int, style: str) -> dict[str, Any]:
    return {"label": label, "run": run, "style": style, **points}


def _run(record: RunRecord, name: str) -> dict[str, Any]:
    """Return what the page says about one run, apart from its curves."""
    spent = time_spent(record.goodput)
    stretches, interruptions = timeline(record.goodput, record.exits, record.state)
    steps, values = points(record.metrics, "val_loss")
    evaluations = dict(zip(map(int, steps), values.tolist(), strict=True))
    losses = {saved.step: saved.val_loss for saved in record.checkpoints if saved.val_loss is not None}
    return {
        "name": name,
        "path": str(record.path),
        "state": record.state,
        "cause": record.exits[-1].cause if record.exits and record.state in ("interrupted", "failed") else "",
        "figures": _figures(record, spent, evaluations),
        "spent": spent,
        "parts": [(part, seconds) for part, seconds in spent.seconds.items() if seconds > NEGLIGIBLE * spent.total],
        "stretches": stretches,
        "interruptions": interruptions,
        "began": record.goodput[0].at if record.goodput else 0.0,
        "samples": _spread(record.samples),
        "sample_count": len(record.samples),
        "evaluations": evaluations,
        "checkpoints": record.checkpoints,
        "best_checkpoint": min(losses, key=lambda step: losses[step], default=None),
        "config_text": record.config_text,
    }


def _figures(record: RunRecord, spent: TimeSpent, evaluations: Mapping[int, float]) -> list[tuple[str, str, str]]:
    """Return the label, value and remark of each figure at the top of the page."""
    steps = max((line["step"] for line in record.metrics), default=0)
    total = record.config.get("train.steps")
    figures = [("step", f"{steps:,}", f"of {total:,}" if isinstance(total, int) else "")]
    if evaluations:
        best = min(evaluations, key=lambda step: evaluations[step])
        figures.append(("validation loss", f"{evaluations[best]:.4f}", f"lowest, at step {best:,}"))
    losses, tokens, speeds, mfus = (points(record.metrics, name)[1] for name in SHOWN_FIGURES)
    if len(losses):
        figures.append(("training loss", f"{losses[-1]:.4f}", "last logged step"))
    if len(tokens):
        figures.append(("tokens", scaled_text(tokens[-1]), "trained on"))
    if len(speeds):
        mfu = f", MFU {np.median(mfus):.1%}" if len(mfus) else ""
        figures.append(("tokens/s", scaled_text(float(np.median(speeds)), "rate"), f"median{mfu}"))
    if spent.total:
        figures.append(("goodput", f"{spent.goodput:.1%}", f"of {duration(spent.total)}"))
    return figures


def _spread(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first sample, the last one, and some evenly between them."""
    if len(samples) <= MAX_SAMPLES:
        return list(samples)
    return [samples[round(place * (len(samples) - 1) / (MAX_SAMPLES - 1))] for place in range(MAX_SAMPLES)]


def _keys(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the keys that are not the default in a run, each with its values; first those that differ between runs."""
    defaults = {f"{name}.{key}": value for name, section in to_dict(Config()).items() for key, value in section.items()}
    rows = []
    for key in dict.fromkeys([*defaults, *(key for run in runs for key in run.config)]):
        default = defaults.get(key, "")
        values = [run.config.get(key, default) for run in runs]
        if key not in PLACE_KEYS and any(value != default for value in values):
            differs = any(value != values[0] for value in values)
            row = {"key": key, "default": _value(default), "values": [_value(value) for value in values]}
            rows.append({**row, "differs": differs})
    return sorted(rows, key=lambda row: not row["differs"])


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
