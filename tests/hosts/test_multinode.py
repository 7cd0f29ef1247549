"""launch/multinode.sh on several hosts: it trains what one process trains, also over slow and broken links."""

import itertools
import json
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests import jobs
from tests.hosts.conftest import MakeNetwork
from tests.hosts.launching import SLOW, multinode
from tests.hosts.network import Network
from tests.once import made_once

# With a checkpoint after each step, more than six minutes of a slow job.
STEPS = 100
# Divides over 1, 2, 3 and 6 ranks, in the same micro-batches. GELU: sums over other numbers of
# ranks differ in the last bit, which at the kink of a ReLU can become a large difference.
SHAPE = (
    "--model.mlp=gelu",
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=16", "--model.dropout=0.1"),
    *("--train.global_batch=12", "--train.micro_batch=2", f"--train.steps={STEPS}", "--train.dtype=float32"),
    *("--optim.lr=1e-3", "--optim.grad_clip=1.0", "--eval.every=50", "--eval.sequences=30", "--eval.sample_tokens=0"),
    *("--checkpoint.every=1", "--log.every=1"),
)
# For tests that cut the network: a cut is noticed soon. Not sooner, since on a busy machine a rank may start 15 seconds
# after another. Other tests keep the defaults.
SHORT_TIMEOUTS = ("--health.timeout=45", "--health.eval_timeout=45", "--health.checkpoint_timeout=45")
SLOW_LAUNCHER = {**jobs.FORKED_LAUNCHER, "PYTHONPATH": SLOW}
OPEN_LOCK = """
import sys
from pathlib import Path
from distgpt.run.lock import RunLock
from distgpt.run.paths import RunPaths
from distgpt.cli import main_guard
main_guard(lambda: RunLock(RunPaths(Path(sys.argv[1]))))
"""


@pytest.fixture(scope="session")
def one_process(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process."""

    def train(directory: Path) -> None:
        done = jobs.command("train", *SHAPE, f"--data.path={prepared}", f"--run.dir={directory / 'run'}")
        assert done.code == 0, done

    return made_once(tmp_path_factory, "one-process", train) / "run"


def make_slow(run: Path) -> None:
    """Make the job that will train in `run` slow, until the file is removed."""
    run.mkdir()
    (run / "slow").touch()


def has_no_rank(hosts: Network, host: str) -> bool:
    return not hosts.ranks(host)


def finish(running: Mapping[str, jobs.Job]) -> dict[str, jobs.Ended]:
    """Read all jobs to their end, at once: a job that is not read would make the others wait."""
    with ThreadPoolExecutor(len(running)) as pool:
        endings = {host: pool.submit(job.finish) for host, job in running.items()}
        return {host: ending.result() for host, ending in endings.items()}


def assert_finished(endings: Mapping[str, jobs.Ended], run: Path, one_process: Path) -> None:
    """Check that every host ended with 0, and that the run is equal to that of one process."""
    for host, ended in endings.items():
        assert ended.code == 0, f"{host}: {ended}"
    assert_same_run(run, one_process)


def assert_same_run(run: Path, one_process: Path) -> None:
    assert jobs.losses(run) == pytest.approx(jobs.losses(one_process), abs=1e-4)
    assert jobs.val_losses(run) == pytest.approx(jobs.val_losses(one_process), abs=1e-4)
    assert jobs.exit_report(run)["code"] == 0
    newest = jobs.checkpoints(one_process)[-1]
    assert jobs.checkpoints(run)[-1] == newest
    weights, expected = (jobs.tensors(r / "checkpoints" / newest) for r in (run, one_process))
    for name, value in expected.items():
        assert (weights[name] - value).abs().max() < 1e-4, name


def test_four_hosts_train_as_one_process_and_the_slow_host_is_named(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path
) -> None:
    arguments = [*SHAPE, "--train.global_batch=16", "--train.steps=20", "--eval.every=10", f"--data.path={prepared}"]
    alone = jobs.command("train", *arguments, f"--run.dir={tmp_path / 'alone'}")
    assert alone.code == 0, alone
    hosts = make_network(4)
    hosts.limit("n3", "100mbit")
    endings = finish(multinode(hosts, [*arguments, f"--run.dir={tmp_path / 'run'}"], head="n2"))
    assert_finished(endings, tmp_path / "run", tmp_path / "alone")
    said = "".join(ended.stdout for ended in endings.values())
    # tc's 100 Mbit/s is 12.5 MB/s. On a busy machine other links may be reported too, but with higher rates.
    assert re.search(r"^warn  links +.*?slow: n3 -> n[24] 1[0-3]\.\d MB/s", said, re.MULTILINE), said
    assert re.search(r"^ok    same config +on all 4 hosts", said, re.MULTILINE), said


def test_a_mistake_on_one_host_ends_the_job_on_all(make_network: MakeNetwork, prepared: Path, tmp_path: Path) -> None:
    hosts = make_network(2)
    common = [*SHAPE, f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}"]
    endings = finish(
        multinode(hosts, common, on=["n1"]) | multinode(hosts, [*common, "--optim.beta2=0.5"], on=["n2"], nodes="2")
    )
    assert [ended.code for ended in endings.values()] == [2, 2], endings
    line = "same config: optim.beta2: n1 has 0.999, n2 has 0.5: start the same command on all hosts"
    for ended in endings.values():
        assert f"distgpt: error: {line}" in ended.stderr, ended
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_over_a_possible_number_of_hosts_starts_nothing(
    installed: None, tmp_path: Path
) -> None:
    script, settings = str(jobs.PROJECT / "launch" / "multinode.sh"), {"HEAD": "nowhere:1", "NPROC_PER_NODE": "1"}
    flags = ("--train.global_batch=16", f"--run.dir={tmp_path / 'run'}")
    for nodes, micro_batch, hosts in (("3:4", 0, 3), ("4", 8, 4)):
        done = jobs.run([script, *flags, f"--train.micro_batch={micro_batch}"], **settings, NODES=nodes)
        assert done.code == 2, done
        (line,) = done.stderr.splitlines()
        assert f"train.global_batch 16 does not divide over {hosts} hosts x 1 ranks" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HEAD", "localhost:99999"),
        ("HEAD", "localhost"),
        ("NODES", "0"),
        ("NODES", "two"),
        ("NPROC_PER_NODE", "0"),
        ("JOIN_SECONDS", "10m"),
        ("TRIES", "x"),
    ],
)
def test_an_invalid_setting_starts_nothing(installed: None, tmp_path: Path, name: str, value: str) -> None:
    settings = {"HEAD": "localhost:29400", "NODES": "2", name: value}
    done = jobs.run([str(jobs.PROJECT / "launch" / "multinode.sh"), f"--run.dir={tmp_path / 'run'}"], **settings)
    assert done.code == 2, done
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"distgpt: error: {name}={value}")
    assert not (tmp_path / "run").exists()


def test_a_head_that_no_host_joins_reports_it_once(make_network: MakeNetwork, prepared: Path, tmp_path: Path) -> None:
    hosts = make_network(2)
    arguments = [*SHAPE, f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}"]
    settings = {"nodes": "2", "JOIN_SECONDS": "3", "TRIES": "2", **jobs.FORKED_LAUNCHER}
    done = multinode(hosts, arguments, on=["n1"], **settings)["n1"].finish()
    line = "distgpt: 1 of 2 hosts came within 3 s (this one): start the same command on the missing ones"
    assert (done.code, done.stdout) == (75, ""), done
    # torch itself warns of a host name that it cannot look up.
    assert [said for said in done.stderr.splitlines() if "socket.cpp" not in said] == [line]
    assert not (tmp_path / "run").exists()


def test_a_port_that_is_taken_starts_nothing(installed: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script, settings = str(jobs.PROJECT / "launch" / "multinode.sh"), {"HEAD": f"127.0.0.1:{port}", "NODES": "2"}
        done = jobs.run([script, f"--run.dir={tmp_path / 'run'}"], **settings)
    assert done.code == 2, done
    (line,) = done.stderr.splitlines()
    assert f"port {port} of 127.0.0.1 is taken" in line
    assert not (tmp_path / "run").exists()


def test_another_job_at_the_same_head_is_left_out(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path, one_process: Path
) -> None:
    hosts, run = make_network(3), tmp_path / "run"
    make_slow(run)
    arguments, settings = [*SHAPE, f"--data.path={prepared}"], {"head": "n2", "nodes": "2:3", **SLOW_LAUNCHER}
    running = multinode(hosts, [*arguments, f"--run.dir={run}"], on=["n1", "n2"], **settings)
    running["n1"].read_until(f"step  10/{STEPS}")
    others = [*arguments, f"--run.dir={tmp_path / 'other'}"]
    other_job = multinode(hosts, others, on=["n3"], **settings, JOIN_SECONDS="3", TRIES="1")["n3"]
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(other_job.finish)
        # Go on reading the first job, which waits for its reader: it could let the other host in only after a step.
        steps = itertools.count(11)
        while not ending.done():
            running["n1"].read_until(f"step {next(steps):3}/{STEPS}")
    (run / "slow").unlink()
    endings = finish(running)
    assert ending.result().code == 75, ending.result()
    assert "2 hosts did not meet at n2 within 3 s: do all of them have the same run.dir" in ending.result().stderr
    assert not (tmp_path / "other").exists()
    assert_finished(endings, run, one_process)
    assert "going on from step" not in endings["n1"].stdout


def test_hosts_that_cannot_reach_each_other_are_named(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path
) -> None:
    """All reach the head, so torchrun starts. Its process group would only time out, without the names of the hosts."""
    hosts = make_network(3)
    hosts.isolate("n2", "n3")
    endings = finish(multinode(hosts, [*SHAPE, f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}"]))
    assert [ended.code for ended in endings.values()] == [74, 74, 74], endings
    for ended in endings.values():
        assert "n2 cannot reach n3 at 10.77.0.3 (" in ended.stderr, ended
        assert "n3 cannot reach n2 at 10.77.0.2 (" in ended.stderr, ended
        assert "cannot reach n1" not in ended.stderr, ended


def test_a_loss_that_is_not_finite_ends_the_job_on_all(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path
) -> None:
    hosts = make_network(2)
    arguments = [*SHAPE, f"--data.path={prepared}", f"--run.dir={tmp_path / 'run'}"]
    endings = finish(multinode(hosts, [*arguments, "--optim.lr=1e30", "--optim.grad_clip=0"]))
    assert [ended.code for ended in endings.values()] == [65, 65], endings


def test_a_host_joins_is_lost_and_comes_back(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path, one_process: Path
) -> None:
    hosts, run = make_network(3), tmp_path / "run"
    make_slow(run)
    # With --run.fresh, ranks that restart, for example because a host joined, must resume all the same.
    arguments = [*SHAPE, *SHORT_TIMEOUTS, f"--data.path={prepared}", f"--run.dir={run}", "--run.fresh"]
    settings = {"head": "n2", "nodes": "2:3", **SLOW_LAUNCHER}
    running = multinode(hosts, arguments, on=["n1", "n2"], **settings)
    two, three = "= 2 ranks x 2 x 3 accumulation steps", "= 3 ranks x 2 x 2 accumulation steps"
    running["n1"].read_until(two)
    running |= multinode(hosts, arguments, on=["n3"], **settings)
    running["n1"].read_until(three)
    running["n1"].read_two_steps()
    hosts.cut("n3")
    # Again, not a second time: hosts may form a group without the new one before one with it.
    running["n1"].read_until_again(two)
    hosts.heal("n3")
    running["n1"].read_until_again(three)
    (run / "slow").unlink()
    assert_finished(finish(running), run, one_process)


def test_a_host_is_cut_off_for_good(
    make_network: MakeNetwork, prepared: Path, tmp_path: Path, one_process: Path
) -> None:
    """Cut off the most important host: rank 0, which writes and holds the lock, runs on n1, the lowest address."""
    hosts, run = make_network(3), tmp_path / "run"
    make_slow(run)
    arguments = [*SHAPE, *SHORT_TIMEOUTS, f"--data.path={prepared}", f"--run.dir={run}"]
    settings = {"head": "n2", "nodes": "2:3", **SLOW_LAUNCHER}
    running = multinode(hosts, arguments, on=["n1", "n2"], **settings)
    running["n1"].read_until("= 2 ranks")
    running |= multinode(hosts, arguments, on=["n3"], **settings)
    running["n1"].read_until("= 3 ranks")
    running["n1"].read_two_steps()
    assert owner(run) == "n1"

    hosts.cut("n1")
    with ThreadPoolExecutor(1) as pool:
        lost = running.pop("n1")
        lost_ending = pool.submit(lost.finish)
        jobs.poll(lambda: not hosts.ranks("n1"))
        jobs.poll(lambda: owner(run) != "n1")
        # The other hosts now hold the lock, and are too slow to end. A late writer on n1 needs the lock.
        refused = jobs.run(hosts.command("n1", sys.executable, "-c", OPEN_LOCK, str(run)))
        (run / "slow").unlink()
        endings = finish(running)
        assert not hosts.ranks("n1")
        lost.signal(signal.SIGTERM)
        # 0 if it has seen in the run directory that the run is done.
        assert lost_ending.result().code in (0, 75)
    assert refused.code == 73, refused
    assert "in use by pid" in refused.stderr
    assert_finished(endings, run, one_process)


def test_a_link_that_heals(make_network: MakeNetwork, prepared: Path, tmp_path: Path, one_process: Path) -> None:
    """A cut of three seconds changes nothing. After a longer one, each host ends its attempt, and all start again."""
    hosts, run = make_network(2), tmp_path / "run"
    running = multinode(
        hosts, [*SHAPE, *SHORT_TIMEOUTS, f"--data.path={prepared}", f"--run.dir={run}"], **jobs.FORKED_LAUNCHER
    )
    running["n1"].read_until(f"step  20/{STEPS}")
    first = hosts.ranks("n1")
    hosts.cut("n2")
    time.sleep(3)
    hosts.heal("n2")
    running["n1"].read_until(f"step  60/{STEPS}")
    assert hosts.ranks("n1") == first
    hosts.cut("n2")
    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(finish, running)
        for host in hosts.hosts:
            jobs.poll(partial(has_no_rank, hosts, host))
        hosts.heal("n2")
        endings = ending.result()
    assert_finished(endings, run, one_process)
    assert "starting again" in endings["n1"].stderr


def owner(run: Path) -> str | None:
    """Return the host of the process that holds the lock, or held it last."""
    try:
        return str(json.loads((run / "LOCK").read_text())["host"])
    except (OSError, ValueError):
        return None
