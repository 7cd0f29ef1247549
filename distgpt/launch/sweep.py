"""Train the lines of a file, one run after the other: launch/sweep.sh. Imports no torch."""

import os
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distgpt.config import Config, keys, resolve, value_at, with_absolute_paths
from distgpt.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, DistgptError, UsageError
from distgpt.files import user_path
from distgpt.launch import local
from distgpt.launch.agent import Supervisor
from distgpt.launch.policy import say, say_end
from distgpt.run.exit_report import read_report
from distgpt.run.paths import RunPaths

USAGE = "usage: launch/sweep.sh FILE [PRESET] [--section.key=value ...]: each line of FILE adds its own flags"
# Keys of LEARNING that a line may change after its run has begun: the steps, what a run resolves, and where it is.
MAY_CHANGE = ("run.dir", "run.fresh", "train.steps", "train.micro_batch", "train.dtype", "train.compile")
LEARNING = ("run.", "data.", "init.", "model.", "optim.", "train.")


@dataclass(frozen=True, eq=False)
class Line:
    """A run of a sweep: the number of its line, from 1, and all options of distgpt.train."""

    number: int
    options: list[str]
    config: Config

    def __str__(self) -> str:
        return f"line {self.number}, {self.config.run_dir}"


def main(arguments: list[str]) -> int:
    """Train what is not done, and go on after a line that fails. Raises UsageError for a file that cannot work.

    Returns 0, the exit code of the first line that failed, or 75 after a signal.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return EXIT_OK if arguments else EXIT_USAGE
    lines = read_sweep(Path(user_path(arguments[0])), arguments[1:])
    supervisor = Supervisor(timeout=max(line.config.health.timeout for line in lines))
    failed: dict[Line, int] = {}
    for line in lines:
        if code := train(line, supervisor):
            failed[line] = code
        if supervisor.signalled and (code or line is not lines[-1]):
            say(f"stopped by {supervisor.signalled.name} at {line}: run it again to go on")
            return EXIT_INTERRUPTED
    if not failed:
        return EXIT_OK
    for line, code in failed.items():
        say(f"{line}: failed with code {code}")
    first = next(iter(failed.values()))
    say_end(first, f"{len(failed)} of {len(lines)} runs failed: run it again to try them again")
    return first


def train(line: Line, supervisor: Supervisor) -> int:
    """Train a line to its last step unless that is done; return the exit code."""
    try:
        require_same_options(line.config)
        if is_done(line.config):
            say(f"{line}: done before")
            return EXIT_OK
        say(f"{line}: training")
        return local.train(line.config, line.options, supervisor)
    except DistgptError as error:
        say_end(error.code, str(error))
        return error.code


def read_sweep(file: Path, common: Sequence[str]) -> list[Line]:
    """Read the runs of a file, with the options that are common to all.

    Empty lines, and those that begin with #, are left out. Raises UsageError for a line that cannot work, and for two
    with the same run directory.
    """
    try:
        texts = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}): it must name a file with a line of flags a run") from None
    lines = []
    for number, text in enumerate(texts, 1):
        if text.strip() and not text.lstrip().startswith("#"):
            try:
                lines.append(_line(number, shlex.split(text), common))
            except (UsageError, ValueError) as error:
                raise UsageError(f"{file}, line {number}: {error}") from None
    if not lines:
        raise UsageError(f"{file} has no line of flags")
    same = defaultdict(list)
    for line in lines:
        same[os.path.abspath(line.config.run_dir)].append(str(line.number))
    if shared := next((numbers for numbers in same.values() if len(numbers) > 1), None):
        raise UsageError(f"{file}: lines {' and '.join(shared)} have the same run.dir: give each its own, or none")
    return lines


def _line(number: int, flags: list[str], common: Sequence[str]) -> Line:
    options = [*common, *flags]
    own = directory_of_task(resolve(options, os.environ), flags, number - 1)
    options.append(f"--run.dir={own}")
    return Line(number, options, resolve(options, os.environ))


def directory_of_task(config: Config, flags: Sequence[str], task: int) -> Path:
    """Return the run directory of a line of a sweep: the one that its flags name, or one of its own.

    `task`: the index of the line, from 0.
    """
    named = "--run.dir" in (flag.partition("=")[0] for flag in flags)
    return config.run_dir if named else Path(f"{config.run_dir}-{task}")


def is_done(config: Config) -> bool:
    """Tell whether a run has reached its last step."""
    report = read_report(RunPaths(config.run_dir).exit_report) or {}
    return report.get("code") == EXIT_OK and (report.get("step") or 0) >= config.train.steps


def require_same_options(config: Config) -> None:
    """Raise UsageError if the run directory has a run that learns something else, as after a change of the line."""
    recorded = RunPaths(config.run_dir).config
    if not recorded.is_file():
        return
    before, now = resolve([str(recorded)], {}), with_absolute_paths(config)
    learning = [key for key in keys() if key.startswith(LEARNING) and key not in MAY_CHANGE]
    values = {key: (value_at(before, key), value_at(now, key)) for key in learning}
    if changed := [f"{key} {old} -> {new}" for key, (old, new) in values.items() if old != new]:
        fix = "give the line another --run.dir, or remove that directory"
        raise UsageError(f"{config.run_dir} has a run with other options ({'; '.join(changed)}): {fix}")
