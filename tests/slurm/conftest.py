"""One cluster for all tests, and jobs whose results several tests use."""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import jobs
from tests.slurm.cluster import DAEMONS, Cluster

TRAIN = jobs.PROJECT / "slurm" / "train.sh"
FLAGS = (
    *(*jobs.TINY, "--train.steps=24", "--train.micro_batch=1", "--eval.every=8", "--checkpoint.every=4"),
    "--health.timeout=300",
)
# What a user's file for modules or a virtual environment is; `hold` lets a test hold a run at a step. A rank that has a
# node for itself gets one core, since with several it would round differently than the ranks that share one.
ENVIRONMENT = f"""\
PATH={Path(sys.executable).parent}:$PATH
export PYTHONPATH={Path(__file__).parent / "hold"}${{PYTHONPATH:+:$PYTHONPATH}} CUDA_VISIBLE_DEVICES=
cores=({" ".join(map(str, sorted(os.sched_getaffinity(0))))})
if [[ ${{NPROC_PER_NODE:-}} == 1 ]]; then
    DISTGPT_RUN="taskset --cpu-list ${{cores[${{SLURM_NODEID:-0}} % ${{#cores[@]}}]}}"
fi
"""


class Runs:
    """Training jobs on the cluster, started with slurm/train.sh as it is."""

    def __init__(self, cluster: Cluster, data: Path) -> None:
        self.cluster = cluster
        self._data = data
        (cluster.work / "environment").write_text(ENVIRONMENT)

    def submit(self, name: str, *flags: str, sbatch: tuple[str, ...] = (), **variables: str) -> str:
        """Train in runs/NAME. Returns the id of the job."""
        known = {"DISTGPT_ENV": "environment", "DISTGPT_PREFLIGHT": "no", **variables}
        paths = (f"--data.path={self._data}", f"--run.dir=runs/{name}")
        return self.cluster.sbatch(*sbatch, TRAIN, *FLAGS, *paths, *flags, **known)

    def submit_held(
        self, name: str, *steps: int, flags: tuple[str, ...] = (), sbatch: tuple[str, ...] = (), **variables: str
    ) -> str:
        """Train in runs/NAME, held at each of these steps until release(). Returns once it is at the first of them."""
        self.directory(name).mkdir(parents=True)
        for step in steps:
            self._hold(name, step).touch()
        job = self.submit(name, *flags, sbatch=sbatch, **variables)
        self.reach(job, name, steps[0])
        return job

    def reach(self, job: str, name: str, step: int) -> None:
        """Wait until the run is held at `step`."""
        checkpoints, written = self.directory(name) / "checkpoints", f".staging-*/step-{step:08d}/manifest.json"
        self.cluster.wait_for(job, lambda: any(checkpoints.glob(written)))

    def release(self, name: str, step: int) -> None:
        self._hold(name, step).unlink()

    def directory(self, name: str) -> Path:
        return self.cluster.work / "runs" / name

    def logs(self, job: str, name: str, attempt: int) -> Path:
        return self.directory(name) / "logs" / f"slurm-{job}" / f"attempt-{attempt}"

    def _hold(self, name: str, step: int) -> Path:
        return self.directory(name) / f"hold-step-{step:08d}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [command for command in (*DAEMONS, "sbatch", "srun") if not shutil.which(command, path=path)]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def runs(cluster: Cluster, prepared: Path) -> Runs:
    return Runs(cluster, prepared)


@pytest.fixture(scope="session")
def undisturbed(runs: Runs) -> dict[int, Path]:
    """The same run on 1, 2 and 4 nodes: on 1 as a task of a sweep, on 2 after the preflight."""
    (runs.cluster.work / "sweep").write_text('--optim.lr=1e-3\r\n--optim.lr=2e-3 "--run.dir=runs/%j fast"\r\n')
    array = runs.submit("sweep", sbatch=("--array=0-1",), DISTGPT_SWEEP="sweep")
    two = runs.submit("two", sbatch=("--nodes=2",), DISTGPT_PREFLIGHT="", **jobs.NOT_FORKED)
    four = runs.submit("four", sbatch=("--nodes=4",))
    for job in (f"{array}_0", f"{array}_1", two, four):
        ended = runs.cluster.end_of(job)
        assert ended["JobState"] == "COMPLETED", runs.cluster.log(job)
        assert re.fullmatch(r"step 24/24 loss [0-9.]+ ETA 0-00:00:00", ended["Comment"])
    return {nodes: runs.directory(name) for nodes, name in [(1, "sweep-0"), (2, "two"), (4, "four")]}
