"""The run directory: where its files are, and how the run ended."""

import errno
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distgpt.errors import UsageError

EXIT_FILE_VARIABLE = "DISTGPT_EXIT_FILE"
# What a file system answers that has no hard links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True)
class RunPaths:
    """The names of everything in a run directory. Raises UsageError for one whose name no file could tell of."""

    root: Path

    def __post_init__(self) -> None:
        try:
            str(self.root).encode()
        except UnicodeEncodeError:
            raise UsageError(f"run.dir is {str(self.root)!r}, which is not UTF-8: choose another name") from None

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def goodput(self) -> Path:
        return self.root / "goodput.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def plot(self) -> Path:
        return self.root / "plots" / "loss.png"

    @property
    def exit_report(self) -> Path:
        return self.root / "exit.json"

    @property
    def lock(self) -> Path:
        return self.root / "LOCK"


def write_exit_report(
    paths: RunPaths | None, *, code: int, cause: str, rank: int, step: int | None, fence: int = 0
) -> bool:
    """Write exit.json, and a copy to $DISTGPT_EXIT_FILE where a launcher names one.

    The first cause stands, but not one of an earlier owner of the run directory, with a lower `fence`, who was asleep.

    Returns whether this was the first report of the run directory (or, with no directory, of the launcher's file).
    """
    report = {
        "code": code,
        "cause": cause,
        "rank": rank,
        "host": socket.gethostname(),
        "step": step,
        "fence": fence,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "job": this_job(),
    }
    targets = [(paths.exit_report, fence)] if paths else []
    if launcher_file := os.environ.get(EXIT_FILE_VARIABLE):
        targets.append((Path(launcher_file), 0))
    answers = [_write_once(target, report, least_fence) for target, least_fence in reversed(targets)]
    # The run directory's counts most, but its disk may be full. A cause that no file can hold must still be told.
    return next((first for first in reversed(answers) if first is not None), True)


def forget_last_attempt() -> None:
    """Remove the launcher's copy of a report from before this process: torchrun started all ranks of the host anew.

    For every rank, as soon as it starts: any may come to be the one that reports. A report of another host stays,
    where launchers of several share a file: it has another clock, and may have started earlier.
    """
    launcher_file = Path(os.environ.get(EXIT_FILE_VARIABLE, ""))
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = launcher_file.stat().st_mtime < _STARTED
        if before and json.loads(launcher_file.read_text())["host"] == socket.gethostname():
            launcher_file.unlink()


def ending_of_this_job(paths: RunPaths) -> tuple[int, str] | None:
    """The exit code and cause that an earlier attempt of this same torchrun reported, None if it did not."""
    for file in (Path(os.environ.get(EXIT_FILE_VARIABLE, "")), paths.exit_report):
        with suppress(OSError, ValueError):
            report = json.loads(file.read_text())
            if isinstance(report, dict) and report.get("job") == this_job():
                return int(report["code"]), str(report["cause"])
    return None


def this_job() -> str | None:
    """What this torchrun has in common with no other, None without one."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job != "none":  # so is every one called that was given no id
        return job
    with suppress(OSError):
        agent = os.getppid()
        return f"{socket.gethostname()}, pid {agent}, {_start_ticks(agent)}"
    return None


def this_attempt() -> int:
    """Count how often this torchrun has started all ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _start_of_this_process() -> float:
    """In seconds as time.time() has them. Ranks start together: none reports before the last one has started."""
    try:
        ticks = _start_ticks(os.getpid())
    except OSError:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def _start_ticks(pid: int) -> int:
    """When a process started, since the boot of its kernel. Raises OSError where there is no /proc."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


_STARTED = _start_of_this_process()


def _write_once(target: Path, report: dict[str, Any], least_fence: int) -> bool | None:
    """Whether `target` is now this report; False where one stood already, None where none can be written.

    One of a lower fence than the least does not stand.
    """
    staged = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        staged.write_text(json.dumps(report) + "\n")
        try:
            _name_once(staged, target)
        except FileExistsError:
            if _fence_of(target) >= least_fence:
                return False
            os.replace(staged, target)
    except OSError:
        return None
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return True


def _name_once(staged: Path, target: Path) -> None:
    """Have `target` say what `staged` does. Raises FileExistsError if it is there already."""
    try:
        os.link(staged, target)  # atomic, and never replaces
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with target.open("x") as file:  # who reads it now sees less
            file.write(staged.read_text())


def _fence_of(report: Path) -> int:
    try:
        return int(json.loads(report.read_text())["fence"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
