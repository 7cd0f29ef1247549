"""Another user of the cluster cannot run code in a job."""

import os
import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.slurm.conftest import Runs
from tests.strangers import listening


def test_a_job_on_one_node_listens_on_loopback_alone(runs: Runs) -> None:
    job = runs.submit_held("alone", 4)
    found = {pid: listening(pid) for pid in runs.cluster.tasks(job)}
    runs.cluster.command("scancel", job)
    runs.release("alone", 4)
    addresses = [address for of_one in found.values() for address in of_one]
    assert addresses, runs.cluster.log(job)
    assert all(address.is_loopback for address in addresses), found


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_another_user_runs_nothing_in_a_job_of_several_nodes(runs: Runs, tmp_path: Path) -> None:
    """The user reaches the store of the rendezvous, and can disturb the job, which then starts again."""
    proof = tmp_path / "proof"
    job = runs.submit_held("attacked", 4, flags=("--health.timeout=15",), sbatch=("--nodes=2",), NPROC_PER_NODE="1")
    [endpoint] = {variables["RENDEZVOUS_ENDPOINT"] for variables in runs.cluster.tasks(job).values()}
    stranger = [sys.executable, "-m", "tests.slurm.stranger", endpoint.rpartition(":")[2], str(proof)]
    said = jobs.run(stranger)
    runs.release("attacked", 4)
    ended = runs.cluster.end_of(job)
    assert said.code == 0, said
    assert int(said.stdout) > 0
    assert not proof.exists()
    assert ended["JobState"] == "COMPLETED", runs.cluster.log(job)
