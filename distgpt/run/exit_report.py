"""exit.json: why a run ended, written by the first rank that knows. exits.jsonl: why its earlier attempts ended."""

import errno
import json
import os
import socket
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from distgpt.errors import EXIT_CANNOT_CREATE, EXIT_DATA, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from distgpt.run.paths import RunPaths
from distgpt.torchrun import record_cause, start_of_attempt, this_attempt, this_job

EXIT_FILE_VARIABLE = "DISTGPT_EXIT_FILE"
# Errors of a file system without hard links.
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def write_exit_report(
    paths: RunPaths | None, *, code: int, cause: str, rank: int, step: int | None, fence: int = 0
) -> bool:
    """Write exit.json in the run directory, unless `paths` is None, and to $DISTGPT_EXIT_FILE, if a launcher set it.

    The first report wins, unless a previous owner of the run directory (with a lower `fence`) wrote it.
    Returns whether this report is the first, so that this rank is the one to print it.
    """
    now, host = datetime.now().astimezone().isoformat(), socket.gethostname()
    end = {"code": code, "cause": cause, "rank": rank, "host": host, "step": step}
    report = {**end, "fence": fence, "time": now, "job": this_job()}
    launcher_file = os.environ.get(EXIT_FILE_VARIABLE)
    first_for_launcher = _write_once(Path(launcher_file), report, 0) if launcher_file else None
    first_in_directory = _write_once(paths.exit_report, report, fence) if paths else None
    if first_in_directory is not None:
        return first_in_directory
    # Without a run directory, or if its disk is full, the launcher's file decides. A cause that no file can hold must
    # still be printed.
    return first_for_launcher is not False


def remove_report_of_last_attempt() -> None:
    """Remove the launcher's copy of a report if the ranks of an earlier attempt on this host wrote it.

    Every rank calls this as soon as it starts, since any rank may be the first to report. Launchers of several hosts
    may share the file. A report of another host stays, since that host may have started earlier, and its clock differs.
    """
    launcher_file = Path(os.environ.get(EXIT_FILE_VARIABLE, ""))
    report = read_report(launcher_file) or {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        is_older = datetime.fromisoformat(report["time"]).timestamp() < start_of_attempt()
        if is_older and report["host"] == socket.gethostname():
            launcher_file.unlink()


def read_report(file: Path) -> dict[str, Any] | None:
    """Read an exit.json; None if there is none or it is not whole."""
    try:
        report = json.loads(file.read_text())
        return {**report, "code": int(report["code"]), "cause": str(report["cause"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def end_state(code: int) -> Literal["done", "interrupted", "failed"]:
    """Return the state of a run that ended with this exit code."""
    return "done" if code == EXIT_OK else "interrupted" if code == EXIT_INTERRUPTED else "failed"


def archive_report(paths: RunPaths) -> None:
    """Move exit.json, if there is one, to the end of exits.jsonl. Raises OSError if it cannot be removed."""
    if report := read_report(paths.exit_report):
        with suppress(OSError), paths.earlier_exits.open("a") as file:  # a full disk loses the line alone
            file.write(json.dumps(report) + "\n")
    paths.exit_report.unlink(missing_ok=True)


def report_of_this_job(paths: RunPaths) -> tuple[int, str] | None:
    """Return the exit code and cause that an earlier attempt of this torchrun reported; None if there is no report."""
    for file in (Path(os.environ.get(EXIT_FILE_VARIABLE, "")), paths.exit_report):
        report = read_report(file)
        if report and report.get("job") == this_job():
            return report["code"], report["cause"]
    return None


def _write_once(target: Path, report: dict[str, Any], least_fence: int) -> bool | None:
    """Write a report to `target`, unless that holds one whose fence is at least `least_fence`.

    Returns whether the report was written, None if `target` is not writable.
    """
    staged = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        staged.write_text(json.dumps(report) + "\n")
        try:
            _link_once(staged, target)
        except FileExistsError:
            if (read_report(target) or {}).get("fence", 0) >= least_fence:
                return False
            os.replace(staged, target)
    except OSError:
        return None
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
    return True


def _link_once(staged: Path, target: Path) -> None:
    """Link the file `staged` as `target`, or copy it. Raises FileExistsError if `target` exists."""
    try:
        os.link(staged, target)  # atomic, and never replaces
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        with target.open("x") as file:  # not atomic: a reader may see a part of the report
            file.write(staged.read_text())


def exit_if_restart_cannot_help(paths: RunPaths) -> None:
    """Exit if an earlier attempt of this torchrun failed in a way that a restart cannot fix; rank 0 repeats the cause.

    torchrun restarts all ranks regardless of their exit codes.
    """
    if this_attempt():
        code, cause = report_of_this_job(paths) or (EXIT_OK, "")
        if code in (EXIT_USAGE, EXIT_DATA, EXIT_CANNOT_CREATE):
            if os.environ.get("RANK", "0") == "0":
                record_cause(f"distgpt: error: {cause}")
            sys.exit(code)
