"""Checks of the text of the scripts."""

import subprocess
import sys
import tomllib
from pathlib import Path

from tests import jobs


def test_shellcheck_finds_nothing() -> None:
    scripts = [*sorted(jobs.PROJECT.glob("launch/*.sh")), *sorted(jobs.PROJECT.glob("slurm/*.sh")), ".ci/run"]
    assert len(scripts) == 11
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run(
        [str(shellcheck), "--external-sources", "--source-path=SCRIPTDIR:.", *map(str, scripts)],
        cwd=jobs.PROJECT,
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_every_installation_reads_all_kinds_of_files() -> None:
    """The packages for Parquet, .zst, plots and tiktoken are optional, but the README's commands need them.

    Those of `remote` are many, and only some URLs need them.
    """
    extras = tomllib.loads((jobs.PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    uses = ",".join(extra for extra in extras if extra not in ("all", "remote", "test"))
    assert extras["all"] == [f"distgpt[{uses}]"]
    assert extras["all"][0].split("[")[0] + "[all]" in extras["test"]
    for file in ("README.md", "launch/environment.sh"):
        text = (jobs.PROJECT / file).read_text().replace("\\\n", "")
        installations = [line for line in text.splitlines() if "pip install" in line]
        assert installations, file
        assert all("[all" in line for line in installations), file
