"""slurm/prepare.sh on a real Slurm: an array of tasks writes what one process writes."""

import json
import random
from pathlib import Path

from tests import jobs
from tests.slurm.cluster import Cluster

PREPARE = jobs.PROJECT / "slurm" / "prepare.sh"


def test_an_array_writes_what_one_process_writes(cluster: Cluster, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(1000)]
    with corpus.open("w") as file:
        for index in range(800):
            file.write(json.dumps({"text": " ".join([*draw.choices(words, k=50), str(index)]) * 200}) + "\n")
    options = ["--input", str(corpus), "--tokenizer", "bytes"]
    alone = jobs.door("prepare", *options, "--output", tmp_path / "alone")
    assert alone.code == 0, alone
    array = cluster.sbatch("--array=0-2", "--cpus-per-task=1", PREPARE, *options, "--output", tmp_path / "array")
    tasks = [f"{array}_{index}" for index in range(3)]
    for task in tasks:
        assert cluster.end_of(task)["JobState"] == "COMPLETED", cluster.log(task)
    assert contents(tmp_path / "array") == contents(tmp_path / "alone")
    assert not (tmp_path / "array.partial").exists()
    # Exactly one of them wrote it.
    assert sum("prepared    " in cluster.log(task) for task in tasks) == 1


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
