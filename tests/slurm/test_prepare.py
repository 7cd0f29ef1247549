"""slurm/prepare.sh on a real Slurm: an array of tasks writes the same files as one process."""

import json
import random
from pathlib import Path

from tests import jobs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Runs

PREPARE = jobs.PROJECT / "slurm" / "prepare.sh"


def test_an_array_writes_what_one_process_writes(runs: Runs, tmp_path: Path) -> None:
    """Slurm also stops one task, and requeues another one, in the middle of its share."""
    cluster, corpus = runs.cluster, tmp_path / "corpus.jsonl"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(1000)]
    with corpus.open("w") as file:
        for index in range(800):
            file.write(json.dumps({"text": " ".join([*draw.choices(words, k=50), str(index)]) * 200}) + "\n")
    options = ["--input", str(corpus), "--tokenizer", "bytes"]
    alone = jobs.command("prepare", *options, "--output", tmp_path / "alone")
    assert alone.code == 0, alone
    # Seven parts: 2 and 3 are the share of task 1, 4 to 6 that of task 2. Each is held at its second.
    second = {1: "000003.part", 2: "000005.part"}
    for part in second.values():
        (tmp_path / f"hold-{part}").touch()
    array = cluster.sbatch(
        "--array=0-2",
        "--cpus-per-task=1",
        PREPARE,
        *options,
        "--output",
        tmp_path / "array",
        DISTGPT_ENV="environment",
    )

    def disturb(index: int, *command: str, said: str) -> None:
        task, part = f"{array}_{index}", second[index]
        cluster.wait_for(task, lambda: any((tmp_path / "array.partial" / "parts").glob(f"{part}.*")))
        cluster.command(*command, task)
        # Nothing is left of this attempt then that could write the part.
        cluster.wait_for(task, lambda: said in cluster.log(task))
        (tmp_path / f"hold-{part}").unlink()

    disturb(1, "scancel", "--signal=USR1", "--batch", said="exit code 75; requeued to go on")
    disturb(2, "scontrol", "requeue", said="exit code 75; ended by Slurm, which decides whether to start it again")
    tasks = [f"{array}_{index}" for index in range(3)]
    for task in tasks:
        assert cluster.end_of(task)["JobState"] == "COMPLETED", cluster.log(task)
    assert "going on: 1 of 2 parts are done" in cluster.log(tasks[1])
    assert "going on: 1 of 3 parts are done" in cluster.log(tasks[2])
    assert jobs.contents(tmp_path / "array") == jobs.contents(tmp_path / "alone")
    assert not (tmp_path / "array.partial").exists()
    # Exactly one of them wrote it.
    assert sum("prepared    " in cluster.log(task) for task in tasks) == 1


def test_a_part_of_an_array_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    array = cluster.sbatch("--array=1-2", "--cpus-per-task=1", PREPARE, "--output", tmp_path / "array")
    for task in (f"{array}_1", f"{array}_2"):
        assert cluster.end_of(task)["ExitCode"] == "2:0"
        assert "distgpt: error: the array must be --array=0-N, with every task" in cluster.log(task)
