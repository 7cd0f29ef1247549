"""The paths of the files in a run directory."""

from pathlib import Path

from distgpt.errors import UsageError


class RunPaths:
    """The paths of the files in the run directory `root`."""

    def __init__(self, root: Path) -> None:
        """Raise UsageError if the name of the directory is not UTF-8."""
        try:
            str(root).encode()
        except UnicodeEncodeError:
            raise UsageError(f"run.dir is {str(root)!r}, which is not UTF-8: choose another name") from None
        self.root = root
        self.config = root / "config.toml"
        self.metrics = root / "metrics.jsonl"
        self.goodput = root / "goodput.jsonl"
        self.checkpoints = root / "checkpoints"
        self.logs = root / "logs"
        self.plot = root / "plots" / "loss.png"
        self.profile = root / "profile"
        self.exit_report = root / "exit.json"
        self.earlier_exits = root / "exits.jsonl"
        self.lock = root / "LOCK"
