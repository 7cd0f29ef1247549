"""Start the scripts of launch/ from a directory that is not the project, as a user may do."""

from pathlib import Path

from tests import jobs


def launch(directory: Path, script: str, *arguments: str, **variables: str) -> jobs.Ended:
    """Run launch/`script` in `directory` to its end, with one rank."""
    command = ["bash", "-c", 'cd "$0" && exec "$@"', str(directory), str(jobs.PROJECT / "launch" / script)]
    return jobs.run([*command, *arguments], **{"NPROC_PER_NODE": "1", **jobs.NOT_FORKED, **variables})
