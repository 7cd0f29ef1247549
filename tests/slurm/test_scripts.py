"""The scripts as text."""

import shutil
import subprocess

import pytest

from tests import jobs


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
def test_shellcheck_finds_nothing() -> None:
    scripts = sorted((jobs.PROJECT / "slurm").glob("*.sh"))
    checked = subprocess.run(["shellcheck", "-x", *scripts], cwd=jobs.PROJECT, capture_output=True, text=True)
    assert (len(scripts), checked.stdout) == (4, "")
