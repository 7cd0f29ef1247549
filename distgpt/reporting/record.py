"""The content of a run directory, as a page shows it. Files that are missing or damaged count as empty."""

import json
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from distgpt.checkpoint.choice import is_checkpoint
from distgpt.checkpoint.manifest import MANIFEST, committed, read_manifest, read_state, step_of
from distgpt.errors import DataError, StorageError
from distgpt.run.exit_report import end_state, read_report
from distgpt.run.lock import lock_holder
from distgpt.run.paths import RunPaths
from distgpt.telemetry.goodput import Line, read_goodput
from distgpt.telemetry.step_lines import SAMPLES_FILE, read_lines

State = Literal["running", "done", "interrupted", "failed", "killed"]


@dataclass(frozen=True)
class Exit:
    """The report of how an attempt ended, from exit.json or exits.jsonl."""

    code: int
    cause: str
    at: float  # wall clock, seconds since 1970; 0 if unknown

    @property
    def state(self) -> State:
        """The state of a run that ended so."""
        return end_state(self.code)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of a run. Its tensors are not read."""

    step: int
    bytes: int
    at: float  # wall clock
    val_loss: float | None
    damage: str | None


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run directory says about its run."""

    path: Path
    state: State
    config: Mapping[str, Any]  # by key, such as "optim.lr"
    config_text: str
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    goodput: list[Line]
    exits: list[Exit]  # oldest first
    checkpoints: list[Saved]  # oldest first

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.path.resolve().name


def read_run(path: Path) -> RunRecord:
    """Read the directory of a run, or of one of its checkpoints. Raises DataError if it is neither."""
    if is_checkpoint(path):
        path = path.resolve().parents[1]
    paths = RunPaths(path)
    require_run(paths)
    exits = _read_exits(paths)
    has_ended = read_report(paths.exit_report) is not None
    state: State = exits[-1].state if has_ended else "running" if _is_running(paths) else "killed"
    text = _read_text(paths.config)
    return RunRecord(
        path=path,
        state=state,
        config=_flat(text),
        config_text=text,
        metrics=_read_lines(paths.metrics),
        samples=[line for line in _read_lines(path / SAMPLES_FILE) if isinstance(line.get("text"), str)],
        goodput=read_goodput(paths.goodput),
        exits=exits,
        checkpoints=[_read_checkpoint(checkpoint) for checkpoint in reversed(committed(paths.checkpoints))],
    )


def require_run(paths: RunPaths) -> None:
    """Raise DataError, which says what the path is instead, unless it is a run directory."""
    root = paths.root
    if paths.config.is_file() or paths.metrics.is_file() or committed(paths.checkpoints):
        return
    if not root.exists():
        raise DataError(f"{root} does not exist: give the directory of a run")
    if not root.is_dir():
        raise DataError(f"{root} is a file: give the directory of a run")
    if (root / "meta.json").exists():
        raise DataError(f"{root} is prepared data: give the directory of a run")
    raise DataError(f"{root} holds no run: it has neither {paths.config.name} nor {paths.metrics.name} nor checkpoints")


def _is_running(paths: RunPaths) -> bool:
    with suppress(StorageError):  # a copy of a run may lie where no file can be locked
        return lock_holder(paths) is not None
    return False


def _read_text(file: Path) -> str:
    """Return the text of a file, "" if it is missing. Raises StorageError."""
    try:
        return file.read_text(errors="replace") if file.exists() else ""
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror}") from None


def _read_lines(file: Path) -> list[dict[str, Any]]:
    return read_lines(file) if file.exists() else []


def _flat(text: str) -> dict[str, Any]:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}
    sections = {name: section for name, section in tree.items() if isinstance(section, dict)}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}


def _read_exits(paths: RunPaths) -> list[Exit]:
    reports: list[Any] = [read_report(paths.exit_report)]
    for line in reversed(_read_text(paths.earlier_exits).splitlines()):
        try:
            reports.append(json.loads(line))
        except ValueError:
            continue
    return [found for report in reversed(reports) if (found := _exit_of(report)) is not None]


def _exit_of(report: Any) -> Exit | None:
    try:
        return Exit(int(report["code"]), str(report["cause"]), _seconds_of(report.get("time")))
    except (ValueError, KeyError, TypeError):
        return None


def _seconds_of(text: Any) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, TypeError):
        return 0.0


def _read_checkpoint(checkpoint: Path) -> Saved:
    """Read the manifest and the state of a checkpoint; its tensors are not checked."""
    manifest = checkpoint / MANIFEST
    at = manifest.stat().st_mtime if manifest.exists() else 0.0
    try:
        size = sum(entry["bytes"] for entry in read_manifest(checkpoint).values())
        return Saved(step_of(checkpoint), size, at, read_state(checkpoint).val_loss, None)
    except (DataError, StorageError) as error:
        return Saved(step_of(checkpoint), 0, at, None, str(error))
