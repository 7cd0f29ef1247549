"""slurm/train.sh on a real Slurm, as it is shipped: it trains, and what interrupts it changes nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import jobs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Runs

LAST = "step-00000024"


@pytest.mark.parametrize("nodes", [2, 4])
def test_several_nodes_learn_what_one_learns(undisturbed: dict[int, Path], nodes: int) -> None:
    assert jobs.exit_report(undisturbed[nodes])["cause"] == "done"
    assert jobs.losses(undisturbed[nodes]) == pytest.approx(jobs.losses(undisturbed[1]), abs=1e-5)
    left, right = (jobs.tensors(undisturbed[n] / "checkpoints" / LAST) for n in (1, nodes))
    for name in left:
        if name.startswith("model."):
            torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-5)
    # Two ranks a node, as many as there are GPUs: each wrote a shard.
    shards = list((undisturbed[nodes] / "checkpoints" / LAST).glob("__*.distcp"))
    assert len(shards) == 2 * nodes


def test_the_hosts_are_checked_before_training(undisturbed: dict[int, Path]) -> None:
    [log] = undisturbed[2].glob("logs/slurm-*/attempt-0/*.log")
    assert log.read_text().index("all-reduce") < log.read_text().index("step  1/24")


def test_an_array_sweeps_over_lines_of_flags(runs: Runs, undisturbed: dict[int, Path]) -> None:
    for name, lr in (("sweep-0", 0.001), ("fast", 0.002)):
        assert f"\nlr = {lr}\n" in (runs.directory(name) / "config.toml").read_text()
        assert jobs.checkpoints(runs.directory(name))[-1] == LAST
    assert jobs.losses(runs.directory("fast")) != jobs.losses(undisturbed[1])


def scancel_signal(cluster: Cluster, job: str) -> None:
    cluster.command("scancel", "--signal=USR1", job)


def preemption(cluster: Cluster, job: str) -> None:
    urgent = cluster.sbatch("--partition=urgent", "--nodes=5", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait_for(urgent, lambda: "main" in cluster.show(job)["Partition"])


def time_limit(cluster: Cluster, job: str) -> None:
    """Three minutes in all: less than `#SBATCH --signal` asks for."""
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=3")
    cluster.wait_for(job, lambda: "SIGUSR1: asking for a save" in cluster.log(job))
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def requeue(cluster: Cluster, job: str) -> None:
    cluster.command("scontrol", "requeue", job)


@pytest.mark.parametrize(
    ("first", "second"), [(scancel_signal, preemption), (time_limit, requeue)], ids=lambda f: f.__name__
)
def test_interrupted_twice_it_ends_the_same(
    runs: Runs, undisturbed: dict[int, Path], first: Callable[..., None], second: Callable[..., None]
) -> None:
    name, run = f"after-{first.__name__}", runs.directory(f"after-{first.__name__}")
    job = runs.submit_held(name, 8, 16, sbatch=("--nodes=2", "--time=60"))
    for attempt, (interrupt, step) in enumerate([(first, 8), (second, 16)]):
        runs.reach(job, name, step)
        interrupt(runs.cluster, job)
        # The ranks of both nodes are told; only then may the run go on.
        log = runs.logs(job, name, attempt)
        runs.cluster.wait_for(job, lambda log=log: len(re.findall("death signal", read(log))) == 2)  # type: ignore[misc]
        runs.release(name, step)
        runs.cluster.wait_for(job, lambda count=attempt + 1: runs.cluster.show(job)["Restarts"] == str(count))  # type: ignore[misc]
        # A requeue gives the ranks no more than Slurm's KillWait, the others the time that they take.
        if interrupt is not requeue:
            report = json.loads((log / "exit.json").read_text())
            assert report["code"] == 75
            assert f"step {report['step']} of 24 is saved" in report["cause"]
    ended = runs.cluster.end_of(job)
    assert ended["JobState"] == "COMPLETED", runs.cluster.log(job)
    assert ended["Restarts"] == "2"
    jobs.assert_same_tensors(run / "checkpoints" / LAST, undisturbed[2] / "checkpoints" / LAST)
    assert jobs.losses(run) == jobs.losses(undisturbed[2])


def test_a_node_that_is_lost(runs: Runs, undisturbed: dict[int, Path]) -> None:
    job = runs.submit_held("lost-node", 12, sbatch=("--nodes=2",))
    [_, node] = runs.cluster.command("scontrol", "show", "hostnames", runs.cluster.show(job)["NodeList"]).split()
    runs.cluster.power_off(node)
    try:
        # Nothing but the scripts sees to it.
        runs.cluster.wait_for(job, lambda: runs.cluster.show(job)["Restarts"] != "0")
        runs.release("lost-node", 12)
        ended = runs.cluster.end_of(job)
    finally:
        runs.cluster.power_on(node)
    assert ended["JobState"] == "COMPLETED", runs.cluster.log(job)
    run = runs.directory("lost-node")
    jobs.assert_same_tensors(run / "checkpoints" / LAST, undisturbed[2] / "checkpoints" / LAST)
    assert jobs.losses(run) == jobs.losses(undisturbed[2])


def test_one_job_a_run_directory_until_it_is_cancelled(runs: Runs) -> None:
    cluster = runs.cluster
    first = runs.submit_held("taken", 8)
    cluster.wait_for(first, lambda: re.match(r"step \d+/24 loss ", cluster.show(first).get("Comment", "")))
    second = runs.submit("taken")
    ended = cluster.end_of(second)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "73:0")
    assert one_error(cluster.log(second)).startswith("the run directory runs/taken is in use by pid ")
    cluster.command("scancel", first)
    runs.release("taken", 8)
    ended = cluster.end_of(first)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--run.dri=x", 2, r"unknown key run\.dri: did you mean run\.dir\?"),
        ("--data.path=nowhere", 65, r"no prepared data in nowhere: run python -m distgpt\.prepare .*"),
        # Only the ranks know how many they are.
        ("--train.global_batch=7", 2, r"train\.global_batch 7 does not divide over 2 ranks: .*"),
    ],
)
def test_a_mistake_is_one_line_and_not_tried_again(runs: Runs, flag: str, code: int, message: str) -> None:
    job = runs.submit("mistake", flag)
    ended = runs.cluster.end_of(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert re.fullmatch(message, one_error(runs.cluster.log(job)))


def test_what_is_missing_is_said(runs: Runs) -> None:
    wrong_home = runs.submit("mistake", DISTGPT_HOME="/nowhere")
    no_gpus = runs.submit("mistake", sbatch=("--exclusive=user",))
    no_environment = runs.submit("mistake", DISTGPT_ENV="nowhere")
    no_line = runs.submit("mistake", sbatch=("--array=0-0",))
    for job, message in {
        wrong_home: "/nowhere is not the project: submit from its directory, or set DISTGPT_HOME to it",
        no_gpus: "n\\d has GPUs and the job asked for none: add --gpus-per-node=N, or NPROC_PER_NODE=2 for its CPUs",
        no_environment: "DISTGPT_ENV names nowhere, which cannot be read",
        f"{no_line}_0": "DISTGPT_SWEEP= holds no line of flags for task 0 .from 0.",
    }.items():
        assert runs.cluster.end_of(job)["ExitCode"] == "2:0"
        assert re.fullmatch(message, one_error(runs.cluster.log(job)))


def test_without_a_new_checkpoint_it_gives_up(runs: Runs) -> None:
    """Everything is killed every time, before any rank can say why."""
    killer = runs.cluster.work / "killer"
    killer.write_text('[[ " $* " == *torch.distributed.run* ]] && kill -KILL $$\nexec "$@"\n')
    (runs.cluster.work / "container").write_text(
        (runs.cluster.work / "environment").read_text() + f'DISTGPT_RUN="bash {killer}"\n'
    )
    job = runs.submit("hopeless", DISTGPT_ENV="container", TRIES="2")
    ended = runs.cluster.end_of(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "2")
    assert one_error(runs.cluster.log(job)).startswith(
        "gave up after 2 attempts that got no further than no checkpoint"
    )


def one_error(log: str) -> str:
    """The one line that tells of an error, without what all of them begin with."""
    [line] = [line for line in log.splitlines() if line.startswith("distgpt: error: ")]
    return line.removeprefix("distgpt: error: ")


def read(logs: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in logs.glob("*.log"))
