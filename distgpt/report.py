"""Write a page about runs: `python -m distgpt.report RUN [RUN ...]`. Imports no torch."""

from distgpt import cli

if __name__ == "__main__":
    cli.run("report")

import argparse
from pathlib import Path

from distgpt.errors import StorageError
from distgpt.files import write_file
from distgpt.reporting.page import build_page
from distgpt.reporting.record import read_run


def main(arguments: argparse.Namespace) -> None:
    """Read the runs and write the page in one step. Raises DataError, StorageError."""
    output = Path(arguments.output)
    page = build_page([read_run(Path(run)) for run in arguments.runs])
    try:
        write_file(output, page.encode(errors="replace"))
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error.strerror}") from None
    print(f"wrote {output}: open it in a browser")
