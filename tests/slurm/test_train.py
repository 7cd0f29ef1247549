"""slurm/train.sh on a real Slurm: it trains, and interruptions do not change the result."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import jobs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import TRAIN, Runs

LAST = "step-00000024"
# What happens to a job that trains in the run directory of this name; the job's id when it has ended.
Story = Callable[[Runs, str], str]


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
    """Rank 0, which prints the findings, may be on another node in the preflight than in training."""
    [logs] = undisturbed[2].glob("logs/slurm-*/attempt-0")
    assert "all-reduce" in said(logs)
    assert "step  1/24" in said(logs)


def test_a_job_that_goes_well_has_two_lines_to_say(runs: Runs, undisturbed: dict[int, Path]) -> None:
    """Slurm prints no warning about the options either."""
    [logs] = undisturbed[4].glob("logs/slurm-*")
    [start, end] = runs.cluster.log(logs.name.removeprefix("slurm-")).splitlines()
    assert start.startswith("distgpt: attempt 0 from no checkpoint on n[")
    assert end == f"distgpt: done: runs/four is at {LAST}"


def test_an_array_sweeps_over_lines_of_flags(runs: Runs, undisturbed: dict[int, Path]) -> None:
    """The file has the line endings of Windows, and a quoted value that Slurm would expand."""
    for name, lr in (("sweep-0", 0.001), ("%j fast", 0.002)):
        assert f"\nlr = {lr}\n" in (runs.directory(name) / "config.toml").read_text()
        assert jobs.checkpoints(runs.directory(name))[-1] == LAST
    assert jobs.losses(runs.directory("%j fast")) != jobs.losses(undisturbed[1])


def scancel_signal(cluster: Cluster, job: str) -> None:
    cluster.command("scancel", "--signal=USR1", job)


def preemption(cluster: Cluster, job: str) -> None:
    nodes = f"--nodelist={cluster.show(job)['NodeList']}"
    urgent = cluster.sbatch("--partition=urgent", nodes, "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.wait_for(urgent, lambda: "main" in cluster.show(job)["Partition"])


def time_limit(cluster: Cluster, job: str) -> None:
    """The limit is three minutes, less than the time in `#SBATCH --signal`."""
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=3")
    cluster.wait_for(job, lambda: "SIGUSR1: asking the ranks to save" in cluster.log(job))
    cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def requeue(cluster: Cluster, job: str) -> None:
    cluster.command("scontrol", "requeue", job)


def interrupt_twice(runs: Runs, run: str, *interruptions: Callable[[Cluster, str], None]) -> str:
    """Each interruption saves and requeues. Only the first attempt finds an empty run directory."""
    job = runs.submit_held(run, 8, 16, flags=("--run.fresh",), sbatch=("--nodes=2", "--time=60"), NPROC_PER_NODE="1")
    for attempt, (interrupt, step) in enumerate(zip(interruptions, (8, 16), strict=True)):
        runs.reach(job, run, step)
        interrupt(runs.cluster, job)
        logs = runs.logs(job, run, attempt)
        # Both ranks are told, and not only the one whose node heard of it first; then the run may go on.
        runs.cluster.wait_for(job, lambda logs=logs: len(told_to_stop(logs)) == 2)  # type: ignore[misc]
        runs.release(run, step)
        runs.cluster.wait_for(job, lambda count=attempt + 1: runs.cluster.show(job)["Restarts"] == str(count))  # type: ignore[misc]
        # A requeue gives the ranks no more than Slurm's KillWait, the others the time that they take.
        if interrupt is not requeue:
            report = json.loads((logs / "exit.json").read_text())
            assert report["code"] == 75
            assert f"step {report['step']} of 24 is saved" in report["cause"]
    assert runs.cluster.end_of(job)["Restarts"] == "2"
    if requeue in interruptions:
        # Slurm tells torchrun; told by the script as well, it would break off what it does about it.
        assert f"got signal: {signal.SIGUSR1.value}" not in said(runs.logs(job, run, interruptions.index(requeue)))
    return job


def signal_and_preemption(runs: Runs, run: str) -> str:
    return interrupt_twice(runs, run, scancel_signal, preemption)


def time_limit_and_requeue(runs: Runs, run: str) -> str:
    return interrupt_twice(runs, run, time_limit, requeue)


def save_beyond_the_time_limit(runs: Runs, run: str) -> str:
    """Slurm kills the ranks, and does not requeue the job by itself."""
    job = runs.submit_held(run, 8)
    runs.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    runs.cluster.wait_for(job, lambda: "attempt 1 from step-00000004" in runs.cluster.log(job))
    runs.release(run, 8)
    runs.cluster.command("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert runs.cluster.end_of(job)["Restarts"] == "1"
    return job


def lost_node(runs: Runs, run: str) -> str:
    job = runs.submit_held(run, 12, sbatch=("--nodes=2",), NPROC_PER_NODE="1")
    [_, node] = runs.cluster.command("scontrol", "show", "hostnames", runs.cluster.show(job)["NodeList"]).split()
    runs.cluster.power_off(node)
    try:
        # Nothing but the scripts sees to it.
        runs.cluster.wait_for(job, lambda: runs.cluster.show(job)["Restarts"] != "0")
        runs.release(run, 12)
        runs.cluster.end_of(job)
    finally:
        runs.cluster.power_on(node)
    return job


STORIES: tuple[Story, ...] = (
    signal_and_preemption,
    time_limit_and_requeue,
    save_beyond_the_time_limit,
    lost_node,
)


@pytest.fixture(scope="session")
def told(request: pytest.FixtureRequest, runs: Runs, undisturbed: dict[int, Path]) -> Iterator[dict[str, Future[str]]]:
    """Run all scenarios of the tests below at the same time, since each mostly waits for Slurm."""
    asking = [item for item in request.session.items if isinstance(item, pytest.Function)]
    wanted = {item.callspec.id for item in asking if "told" in item.fixturenames}
    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(story, runs, name) for story in STORIES if (name := story.__name__) in wanted}


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_what_interrupts_a_job_changes_nothing(
    runs: Runs, undisturbed: dict[int, Path], told: dict[str, Future[str]], story: Story
) -> None:
    """Every scenario has two ranks, on one node or on two, so that all sums are equal bit for bit."""
    job = told[story.__name__].result()
    assert runs.cluster.show(job)["JobState"] == "COMPLETED", runs.cluster.log(job)
    run = runs.directory(story.__name__)
    jobs.assert_same_tensors(run / "checkpoints" / LAST, undisturbed[1] / "checkpoints" / LAST)
    assert jobs.losses(run) == jobs.losses(undisturbed[1])


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


def test_what_cannot_succeed_ends_with_one_line(runs: Runs) -> None:
    # Everything is killed every time, before any rank can say why.
    (runs.cluster.work / "killer").write_text('[[ " $* " == *" slurm node "* ]] && kill -KILL $$\nexec "$@"\n')
    known = (runs.cluster.work / "environment").read_text()
    (runs.cluster.work / "container").write_text(f'{known}DISTGPT_RUN="bash {runs.cluster.work / "killer"}"\n')
    (runs.cluster.work / "packages").write_text("DISTGPT_RUN=no-such-command\n")
    endings = {
        runs.submit("always-killed", DISTGPT_ENV="container", TRIES="2"): (
            75,
            "2",
            r"gave up after 2 attempts without a new checkpoint \(newest: no checkpoint\).*",
        ),
        runs.submit("mistake", TRIES="x"): (2, "0", "TRIES=x: it must be a whole number from 1"),
        runs.submit("mistake", "--run.dri=x"): (2, "0", r"unknown key run\.dri: did you mean run\.dir\?"),
        runs.submit("mistake", "--data.path=nowhere"): (
            65,
            "0",
            r"no prepared data in nowhere: run python -m distgpt\.prepare .*",
        ),
        # Only the ranks know how many they are.
        runs.submit("uneven", "--train.global_batch=7"): (
            2,
            "0",
            r"train\.global_batch 7 does not divide over 2 ranks: .*",
        ),
        runs.submit("mistake", DISTGPT_HOME="/nowhere"): (
            2,
            "0",
            "/nowhere is not the project: submit from its directory, or set DISTGPT_HOME to it",
        ),
        runs.submit("mistake", sbatch=("--exclusive=user",)): (
            2,
            "0",
            r"n\d has GPUs and the job asked for none: add --gpus-per-node=N, or NPROC_PER_NODE=2 for its CPUs",
        ),
        runs.submit("mistake", DISTGPT_ENV="packages"): (
            2,
            "0",
            r"no python with distgpt's packages \(.*no-such-command: command not found\): DISTGPT_ENV=packages must .*",
        ),
        runs.submit("mistake", DISTGPT_ENV="nowhere"): (2, "0", "DISTGPT_ENV names nowhere, which cannot be read"),
        f"{runs.submit('mistake', sbatch=('--array=0-0',))}_0": (
            2,
            "0",
            r"DISTGPT_SWEEP= cannot be read: .*",
        ),
    }
    for job, (code, restarts, message) in endings.items():
        ended = runs.cluster.end_of(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", restarts)
        assert re.fullmatch(message, one_error(runs.cluster.log(job)))


def test_a_job_that_never_trained_has_failed(runs: Runs) -> None:
    """A job that never trained has failed, even if one of its commands exits with 0."""
    work = runs.cluster.work
    known = (work / "environment").read_text()
    (work / "exits").write_text(f"{known}exit 0\n")
    (work / "exits-on-nodes").write_text(f"{known}[[ -z ${{DISTGPT_EXIT_FILE:-}} ]] || exit 0\n")
    (work / "says-nothing").write_text("DISTGPT_RUN=true\n")
    # Stand for a task that cannot be started, and for ranks that leave too early.
    (work / "no-tasks").write_text(f"{known}srun() {{ true; }}\n")
    report = '{"code": 0, "step": 23, "cause": "done"}'
    (work / "too-early").write_text(f"{known}srun() {{ echo '{report}' >$DISTGPT_EXIT_FILE; }}\n")
    ended_by = r"DISTGPT_ENV=\S+ ended the job by exit or set -e: it must run to its end"
    gave_up = r"gave up after 1 attempts without a new checkpoint \(newest: no checkpoint\).*"
    endings = {
        "exits": (2, ended_by),
        "exits-on-nodes": (2, ended_by),
        "says-nothing": (2, r"no python with distgpt's packages \(no output\): DISTGPT_ENV=says-nothing must .*"),
        "no-tasks": (75, gave_up),
        "too-early": (75, gave_up),
    }
    submitted = {name: runs.submit(name, DISTGPT_ENV=name, TRIES="1", NPROC_PER_NODE="1") for name in endings}
    for name, (code, message) in endings.items():
        ended, log = runs.cluster.end_of(submitted[name]), runs.cluster.log(submitted[name])
        assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", f"{code}:0"), log
        assert re.fullmatch(message, one_error(log))
        assert "done: " not in log
    assert "ended at step 23 of 24; requeued" in runs.cluster.log(submitted["too-early"])


def test_a_node_that_does_not_see_the_run_directory_is_named(runs: Runs) -> None:
    cluster, run = runs.cluster, runs.directory("blind")
    run.mkdir(parents=True)
    cluster.power_off("n5")
    cluster.power_on("n5", blind_to=run)
    try:
        job = runs.submit("blind", sbatch=("--nodes=2", "--nodelist=n5"))
        ended = cluster.end_of(job)
    finally:
        cluster.power_off("n5")
        cluster.power_on("n5")
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "73:0", "0")
    place = runs.logs(job, "blind", 0).relative_to(cluster.work)
    fix = "--run.dir must lie on a file system that all nodes share"
    assert one_error(cluster.log(job)) == f"n5 cannot write in {place}: {fix}"


def test_how_it_is_submitted_is_the_users_business(runs: Runs, tmp_path: Path) -> None:
    """The script is submitted through a link, by a relative path, and with --mem-per-cpu."""
    cluster = runs.cluster
    (tmp_path / "my job").symlink_to(TRAIN)
    relative = os.path.relpath(TRAIN, cluster.work)
    for options in ((str(tmp_path / "my job"),), (relative,), ("--mem-per-cpu=100", relative)):
        job = cluster.sbatch(*options, "--run.dri=a b", DISTGPT_ENV="environment")
        assert cluster.end_of(job)["ExitCode"] == "2:0"
        assert one_error(cluster.log(job)) == "unknown key run.dri: did you mean run.dir?"
    # A cluster may give so little by default.
    assert re.search(r"the job may use \d+ of the 8000 MiB of memory of n\d: --mem=0 asks for all", cluster.log(job))


def test_a_signal_before_the_start_requeues(runs: Runs) -> None:
    """The signal comes while DISTGPT_ENV is sourced, which may take long."""
    work = runs.cluster.work
    wait = "touch in-hook\nwhile [[ ! -e leave-hook ]]; do sleep 0.1; done\n"
    (work / "slow").write_text((work / "environment").read_text() + wait)
    job = runs.submit("early", DISTGPT_ENV="slow")
    runs.cluster.wait_for(job, (work / "in-hook").exists)
    runs.cluster.command("scancel", "--signal=USR1", "--batch", job)
    runs.cluster.wait_for(job, lambda: "SIGUSR1" in runs.cluster.log(job) or runs.cluster.ended(job))
    (work / "leave-hook").touch()
    # The line comes after Slurm has requeued the job, in the time that it gives a job to end.
    line = "stopped before the start; requeued to go on"
    runs.cluster.wait_for(job, lambda: line in runs.cluster.log(job) or runs.cluster.ended(job))
    assert line in runs.cluster.log(job)
    runs.cluster.wait_for(job, lambda: runs.cluster.show(job)["Restarts"] == "1" or runs.cluster.ended(job))
    runs.cluster.command("scancel", job)


def test_a_full_disk_is_not_tried_again(runs: Runs) -> None:
    """The disk has no room even for a rank's report, or for the first file of a second job."""
    parent = runs.directory("full")
    parent.parent.mkdir(exist_ok=True)
    with jobs.disk(parent, "size=16m") as disk:
        first = runs.submit_held("full/run", 8)
        jobs.fill(disk / "filler")
        runs.release("full/run", 8)
        for job in (first, runs.submit("full/run")):
            ended = runs.cluster.end_of(job)
            assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "74:0", "0")
            assert re.match(r"cannot write in runs/full/run\b.*: make room", one_error(runs.cluster.log(job)))
            assert "write error" not in runs.cluster.log(job)


def one_error(log: str) -> str:
    """Return the only error line of a job, without its common beginning."""
    [line] = [line for line in log.splitlines() if line.startswith("distgpt: error: ")]
    return line.removeprefix("distgpt: error: ")


def told_to_stop(logs: Path) -> set[str]:
    """Return the process ids of the ranks to which torchrun has passed on a signal, at least once."""
    return set(re.findall(r"Sending process (\d+) closing signal", said(logs)))


def said(logs: Path) -> str:
    """Return the output of torchrun and the ranks in an attempt."""
    return "".join(path.read_text(errors="replace") for path in logs.glob("*.log"))
