"""The scripts of launch/, started from a directory that is not the project, as a person starts them."""

from pathlib import Path

from tests import jobs


def launch(directory: Path, script: str, *arguments: str, **variables: str) -> jobs.Ended:
    """launch/`script` in `directory`, to its end, with one rank."""
    command = ["bash", "-c", 'cd "$0" && exec "$@"', str(directory), str(jobs.PROJECT / "launch" / script)]
    return jobs.run([*command, *arguments], **{"NPROC_PER_NODE": "1", **jobs.NOT_FORKED, **variables})
