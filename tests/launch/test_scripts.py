"""The scripts as text."""

import subprocess
import sys
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
