"""Train on all devices of this machine, and start again after a failure: launch/local.sh. Imports no torch."""

import os
import tempfile
from pathlib import Path

from distgpt.checkpoint.compatibility import require_same_run
from distgpt.config import Config, require_divisible_batch, resolve
from distgpt.corpus.mixture import open_data
from distgpt.errors import EXIT_INTERRUPTED, EXIT_OK
from distgpt.launch.agent import Supervisor
from distgpt.launch.policy import Ending, Tries, can_retry, say, say_end
from distgpt.launch.settings import (
    SIGNALS_OPTION,
    TORCHRUN,
    count_from_environment,
    loopback_rendezvous,
    numa_options,
    torchrun_environment,
)
from distgpt.machine import default_ranks
from distgpt.run.exit_report import read_report, write_exit_report
from distgpt.run.lock import lock_holder
from distgpt.run.paths import RunPaths

KILLED = "killed before any rank could report the cause: run it again to go on"
UNSAVED = "ended at once, as asked: steps after the newest checkpoint are not saved, run it again to go on from there"


def main(arguments: list[str]) -> int:
    """Train until the run is done or cannot go on; return its exit code, which torchrun would turn into 1."""
    config = resolve(arguments, os.environ)
    return train(config, arguments, Supervisor(timeout=config.health.timeout))


def train(config: Config, arguments: list[str], supervisor: Supervisor) -> int:
    """Train as main() does. `arguments`: those that give `config`. Raises DistgptError before torchrun starts."""
    paths = RunPaths(config.run_dir)
    ranks = count_from_environment("NPROC_PER_NODE") or default_ranks(config.train.device)
    tries = Tries(count_from_environment("TRIES") or 3, config.run_dir)
    require_divisible_batch(config, ranks)
    torchrun_options = [f"--nproc_per_node={ranks}", *numa_options(ranks)]
    dataset = open_data(config.data.path)
    if config.parallel.strategy != "diloco":  # the replicas of diloco are known only to the ranks
        require_same_run(paths.checkpoints, config, dataset, replicas=1)
    if tries.newest is None:
        arguments = [*arguments, "--run.fresh=false"]  # checkpoints that a restart finds are this job's own
    while True:
        ending = attempt(supervisor, torchrun_options, arguments)
        if supervisor.ended_unsaved and ending.code is None:
            ending = Ending(EXIT_INTERRUPTED, UNSAVED)
            if lock_holder(paths) is None:  # its ranks are gone, and no other job has the run directory
                write_exit_report(paths, code=EXIT_INTERRUPTED, cause=UNSAVED, rank=0, step=None)
        # The last line says what happened, below torchrun's own report.
        code = EXIT_INTERRUPTED if ending.code is None else ending.code
        if supervisor.signalled or not can_retry(ending.code):
            if ending.cause:
                say_end(code, ending.cause)
            return code
        give_up = tries.count_failure()
        say(ending.cause_without_advice)
        if give_up:
            say(f"gave up after {tries.limit} launches without a new checkpoint: run it again to go on")
            return code
        say(f"starting again from {tries.newest or 'the beginning'}")


def attempt(supervisor: Supervisor, torchrun_options: list[str], arguments: list[str]) -> Ending:
    """Run one torchrun to its end, and return how it ended. `torchrun_options`: those about its ranks."""
    with tempfile.TemporaryDirectory(prefix="distgpt-", ignore_cleanup_errors=True) as scratch:
        report = Path(scratch, "exit.json")
        # Not --standalone, which would listen on all interfaces.
        rendezvous = loopback_rendezvous(f"{scratch}/store", Path(scratch).name)
        env = torchrun_environment(report, shutdown_seconds=600)
        command = (*TORCHRUN, *torchrun_options, "--max-restarts=3", *rendezvous, SIGNALS_OPTION)
        if supervisor.run((*command, "-m", "distgpt.train", *arguments), env) == 0:
            return Ending(EXIT_OK, "")
        return Ending.from_report(read_report(report), otherwise=KILLED)
