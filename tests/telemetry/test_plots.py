"""The plot of the losses: any metrics.jsonl gives a complete PNG or leaves the old one."""

import gc
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from distgpt.errors import StorageError
from distgpt.run.lock import RunLock
from distgpt.run.paths import RunPaths
from distgpt.telemetry.plots import plot_losses, smooth

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write(file: Path, *lines: Mapping[str, float | None]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def owned() -> None:
    """Pass: no other job owns this run directory."""


def blue_pixels(picture: Path) -> int:
    from matplotlib.image import imread

    red, _, blue = np.moveaxis(imread(picture)[..., :3], -1, 0)
    return int((blue - red > 0.3).sum())


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    training = [{"step": s, "loss": 4.0 / s if s != 7 else None} for s in range(1, 100)]
    validation = [{"step": s, "val_loss": 5.0 / s} for s in (50, 99)]
    metrics = write(tmp_path / "metrics.jsonl", *training, *validation)
    plot_losses(metrics, tmp_path / "plots" / "loss.png", require_owned=owned)
    [picture] = (tmp_path / "plots").iterdir()
    assert picture.read_bytes().startswith(SIGNATURE)
    assert blue_pixels(picture) > 1000


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": None}],
        [{"step": 1, "val_loss": 2.0}],
        [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": None}],
    ],
)
def test_few_points_are_drawn_without_warnings(
    tmp_path: Path, lines: list[dict[str, float | None]], recwarn: pytest.WarningsRecorder
) -> None:
    gc.collect()  # what other tests left unclosed would warn later
    recwarn.clear()
    plot_losses(write(tmp_path / "metrics.jsonl", *lines), tmp_path / "loss.png", require_owned=owned)
    assert (tmp_path / "loss.png").read_bytes().startswith(SIGNATURE)
    assert not recwarn.list


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0})
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*loss\.png"):
        plot_losses(metrics, tmp_path / "loss.png", require_owned=owned)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_a_suspended_owner_does_not_replace_the_next_owners_picture(tmp_path: Path) -> None:
    """The takeover happens right after the owner has checked that the run directory is still its own."""
    metrics, picture = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 2.0}), tmp_path / "plots" / "loss.png"

    def take_over() -> None:
        RunLock(RunPaths(tmp_path)).release()
        picture.write_text("of the next owner")

    with pytest.raises(StorageError, match=r"cannot write .*loss\.png"):
        plot_losses(metrics, picture, require_owned=take_over)
    assert [(file.name, file.read_text()) for file in picture.parent.iterdir()] == [("loss.png", "of the next owner")]


def test_smoothing_keeps_straight_lines_and_reduces_noise() -> None:
    line = np.arange(500) * 0.5
    assert np.allclose(smooth(line), line)
    noise = np.random.default_rng(0).normal(size=500)
    assert smooth(noise)[20:-20].std() < 0.3
    assert smooth([3.0]).tolist() == [3.0]
