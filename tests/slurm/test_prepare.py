"""slurm/prepare.sh on a real Slurm: an array of tasks writes what one process writes."""

import json
import random
from pathlib import Path

from tests import jobs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Runs

PREPARE = jobs.PROJECT / "slurm" / "prepare.sh"


def test_an_array_writes_what_one_process_writes(runs: Runs, tmp_path: Path) -> None:
    """Also where Slurm asks a task to stop, or requeues one, in the middle of its share."""
    cluster, corpus = runs.cluster, tmp_path / "corpus.jsonl"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(1000)]
    with corpus.open("w") as file:
        for index in range(800):
            file.write(json.dumps({"text": " ".join([*draw.choices(words, k=50), str(index)]) * 200}) + "\n")
    options = ["--input", str(corpus), "--tokenizer", "bytes"]
    alone = jobs.door("prepare", *options, "--output", tmp_path / "alone")
    assert alone.code == 0, alone
    for index in (1, 2):
        (tmp_path / f"hold-{index:06}.part").touch()
    array = cluster.sbatch(
        *("--array=0-2", "--cpus-per-task=1", PREPARE, *options, "--output", tmp_path / "array"),
        DISTGPT_ENV="environment",
    )

    def disturb(index: int, *command: str) -> None:
        """While it is at a part of its share."""
        task, part = f"{array}_{index}", f"{index:06}.part"
        cluster.wait_for(task, lambda: any((tmp_path / "array.partial" / "parts").glob(f"{part}.*")))
        cluster.command(*command, task)
        cluster.wait_for(task, lambda: cluster.show(task)["Restarts"] == "1")
        (tmp_path / f"hold-{part}").unlink()

    disturb(1, "scancel", "--signal=USR1", "--batch")
    disturb(2, "scontrol", "requeue")
    tasks = [f"{array}_{index}" for index in range(3)]
    for task in tasks:
        assert cluster.end_of(task)["JobState"] == "COMPLETED", cluster.log(task)
    assert "exit code 75; requeued to go on" in cluster.log(tasks[1])
    assert contents(tmp_path / "array") == contents(tmp_path / "alone")
    assert not (tmp_path / "array.partial").exists()
    # Exactly one of them wrote it.
    assert sum("prepared    " in cluster.log(task) for task in tasks) == 1


def test_a_part_of_an_array_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    array = cluster.sbatch("--array=1-2", "--cpus-per-task=1", PREPARE, "--output", tmp_path / "array")
    for task in (f"{array}_1", f"{array}_2"):
        assert cluster.end_of(task)["ExitCode"] == "2:0"
        assert "distgpt: error: the shares are those of --array=0-N, all of them" in cluster.log(task)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
