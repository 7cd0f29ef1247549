"""The messages of slurm/environment.sh when Slurm does not answer, or there is no Python."""

from pathlib import Path

import pytest

from tests import jobs

# Shows what $SHOWN says, and cannot requeue.
SCONTROL = """\
#!/bin/sh
test "$1" = show && echo "$SHOWN"
"""


def said(directory: Path, commands: str, **variables: str) -> jobs.Ended:
    """Source it and run `commands`, with a fake scontrol and a fake python."""
    for name, text in {"scontrol": SCONTROL, "python": "#!/bin/sh\necho no packages\n"}.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    script = jobs.PROJECT / "slurm" / "environment.sh"
    sourced = f"set -euo pipefail; home={directory}; stop_signal=USR1 stopped= child=\n. {script}\n"
    known = {"SLURM_JOB_ID": "1", "SHOWN": "", "PATH": f"{directory}:/usr/bin:/bin", **variables}
    return jobs.run(["bash", "-c", sourced + commands], **known)


@pytest.mark.parametrize(
    ("requeue", "advice"),
    [
        ("Requeue=0", "this job cannot be requeued: submit it again to go on"),
        ("Requeue=1", "Slurm refuses to requeue it now: submit it again only if squeue shows that it is gone"),
    ],
)
def test_a_second_job_is_advised_only_where_slurm_starts_none(tmp_path: Path, requeue: str, advice: str) -> None:
    """After a lost node Slurm may have requeued the job already, and refuses to do it twice."""
    done = said(tmp_path, "requeue 'lost contact'", SHOWN=f"   {requeue} Restarts=0 BatchFlag=1")
    assert (done.code, done.stderr) == (75, f"distgpt: lost contact; {advice}\n")


@pytest.mark.parametrize(
    ("stopped", "limit", "warned"), [(5, "00:03:00", True), (50, "00:02:00", False), (5, "01:00:00", False)]
)
def test_a_time_limit_is_judged_by_when_the_signal_came(tmp_path: Path, stopped: int, limit: str, warned: bool) -> None:
    """The script cannot learn from Slurm which --signal was given."""
    commands = f'scontrol() {{ [[ $1 == requeue ]] || command scontrol "$@"; }}; stopped={stopped}; requeue stop'
    done = said(tmp_path, commands, SHOWN=f"   RunTime=00:00:05 TimeLimit={limit} TimeMin=N/A")
    assert done.code == 75
    first, *more = done.stderr.splitlines()
    assert first == "distgpt: stop; requeued to go on"
    assert bool(more) == warned
    assert "180" not in done.stderr


def test_a_python_without_packages_is_told_of_what_the_user_gave(tmp_path: Path) -> None:
    (tmp_path / "modules").write_text("true\n")
    without = said(tmp_path, "require_python")
    assert without.error_lines == [
        f"distgpt: error: no python with distgpt's packages (no packages): make {tmp_path}/.venv or set DISTGPT_ENV"
    ]
    given = said(tmp_path, "require_python", DISTGPT_ENV=str(tmp_path / "modules"))
    assert given.error_lines == [
        "distgpt: error: no python with distgpt's packages (no packages): "
        f"DISTGPT_ENV={tmp_path / 'modules'} must activate one, or set DISTGPT_RUN"
    ]
    assert without.code == given.code == 2
