"""An audit of the checkpoints of a run: their files, their chain, and config, data and code of today."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from distgpt.checkpoint.chain import code_sha256, config_sha256, find_break
from distgpt.checkpoint.compatibility import as_trained, fixed_differences
from distgpt.checkpoint.manifest import (
    MANIFEST,
    Origin,
    committed,
    find_damage,
    read_manifest,
    read_origin,
    read_state,
    sha256_of,
    step_of,
)
from distgpt.config import Config, resolve, shares_of
from distgpt.errors import DataError, UsageError
from distgpt.machine import available_cpus
from distgpt.run.paths import RunPaths
from distgpt.training.startup import open_data_of_run
from distgpt.training.summary import changes

SAME, OTHER, UNKNOWN = "same", "other", "-"


@dataclass(frozen=True)
class Checked:
    """A checkpoint as it was found, in words. `data`, `code` and `config` are those of today beside its own."""

    checkpoint: str
    bytes: int = 0
    files: str = "damaged"
    chain: str = UNKNOWN
    data: str = UNKNOWN
    code: str = UNKNOWN
    config: str = UNKNOWN


@dataclass(frozen=True)
class Today:
    """The things that checkpoints are compared with. None: not here."""

    manifests: Mapping[int, str]  # the SHA-256 of the manifest of each checkpoint beside them, by step
    config: Config | None
    fingerprint: str | None  # of the data


def audit(checkpoints: Sequence[Path], run: RunPaths, data: str | None) -> tuple[list[Checked], list[str]]:
    """Check committed checkpoints of a run, the oldest first. Returns what was found, and all that is wrong.

    `data`: the directory of the data, None: the run's own. Raises StorageError if a file cannot be read now.
    """
    damage = check_files(checkpoints)
    damage = {checkpoint: found for checkpoint, found in damage.items() if checkpoint.is_dir()}  # others were removed
    good = [checkpoint for checkpoint, found in damage.items() if not found]
    problems: list[str] = []
    config, fingerprint = None, None
    if good:
        try:
            fingerprint = fingerprint_today(as_trained(read_state(good[-1])).data.path, data)
        except DataError as error:
            problems.append(str(error))
    with suppress(UsageError):  # a damaged config.toml; checkpoints have the config too
        config = resolve([str(run.config)], {}) if run.config.is_file() else None
    beside = [c for checkpoint in good[:1] for c in committed(checkpoint.parent) if (c / MANIFEST).is_file()]
    today = Today({step_of(c): sha256_of(c / MANIFEST) for c in beside}, config, fingerprint)
    wrong = {checkpoint: found or find_contradictions(checkpoint, today) for checkpoint, found in damage.items()}
    problems += [f"{checkpoint.name}: {problem}" for checkpoint, found in wrong.items() for problem in found]
    return [describe(c, today) if c in good else Checked(c.name) for c in damage], problems


def check_files(checkpoints: Sequence[Path]) -> dict[Path, list[str]]:
    """Hash the files of checkpoints, several at a time. Returns the damage of each. Raises StorageError."""
    damage: dict[Path, list[str]] = {checkpoint: [] for checkpoint in checkpoints}
    shares: list[tuple[Path, int, int]] = []
    sizes: list[int] = []
    for checkpoint in checkpoints:
        try:
            files = read_manifest(checkpoint)
        except DataError as error:
            damage[checkpoint].append(str(error))
            continue
        shares += [(checkpoint, number, max(1, len(files))) for number in range(max(1, len(files)))]
        sizes += [files[name]["bytes"] for name in sorted(files)] or [0]
    bar = tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=None, leave=False)
    with bar, ThreadPoolExecutor(available_cpus()) as pool:
        found = pool.map(lambda share: find_damage(*share), shares)
        for (checkpoint, *_), size, problems in zip(shares, sizes, found, strict=True):
            damage[checkpoint] += [problem for problem in problems if problem not in damage[checkpoint]]
            bar.update(size)
    return damage


def fingerprint_today(recorded: str, given: str | None) -> str | None:
    """Return the fingerprint of the data of a run, None if it is not here. Raises DataError if it is damaged."""
    if given is None and not all(Path(directory).is_dir() for directory, _ in shares_of(recorded)):
        return None
    return open_data_of_run(recorded, given, fingerprint=None).fingerprint


def find_contradictions(checkpoint: Path, today: Today) -> list[str]:
    """List what a whole checkpoint states that is not so. Code may differ, and keys that a resumed run may change."""
    state, origin = read_state(checkpoint), read_origin(checkpoint)
    problems = []
    if origin is not None:
        if broken := find_break(state.step, origin, today.manifests):
            problems.append(broken)
        if (origin.config, origin.data) != (config_sha256(state.config), state.data_fingerprint):
            problems.append("its manifest states another config or other data than train.json")
    if today.fingerprint not in (None, state.data_fingerprint):
        problems.append("the data is not what it was trained on")
    different = fixed_differences(as_trained(state), today.config) if today.config else []
    return [*problems, *(f"config.toml is of another run: {text}" for text in different)]


def describe(checkpoint: Path, today: Today) -> Checked:
    """Describe a whole checkpoint beside what is here today."""
    state, origin = read_state(checkpoint), read_origin(checkpoint)
    return Checked(
        checkpoint.name,
        bytes=sum(entry["bytes"] for entry in read_manifest(checkpoint).values()),
        files="whole",
        chain=describe_link(state.step, origin, today.manifests),
        data=_compared(state.data_fingerprint, today.fingerprint),
        code=_compared(origin.code if origin else None, code_sha256()),
        config="; ".join(changes(as_trained(state), today.config)) or SAME if today.config else UNKNOWN,
    )


def describe_link(step: int, origin: Origin | None, manifests: Mapping[int, str]) -> str:
    """Say which checkpoint another one follows, and whether that can be checked."""
    if origin is None:
        return "without a chain"
    if find_break(step, origin, manifests):
        return "broken"
    if origin.previous is None:
        return "first of its run"
    before = origin.previous.step
    return f"after step {before}" + ("" if before in manifests else ", which is gone")


def _compared(stated: str | None, found: str | None) -> str:
    return UNKNOWN if stated is None or found is None else SAME if stated == found else OTHER
