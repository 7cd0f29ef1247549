"""The paths of the files in a run directory."""

from dataclasses import dataclass
from pathlib import Path

from distgpt.errors import UsageError


@dataclass(frozen=True)
class RunPaths:
    """The paths of the files in the run directory `root`. Raises UsageError if its name is not UTF-8."""

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
