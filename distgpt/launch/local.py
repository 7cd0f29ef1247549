"""Launch a job on all devices of this machine, and start it again when a rank dies or hangs."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distgpt.config import Config, require_divisible_batch
from distgpt.errors import EXIT_INTERRUPTED, EXIT_OK
from distgpt.launch.agent import TORCHRUN, Supervisor
from distgpt.launch.policy import UNKNOWN_CAUSE, Ending, Tries, count_from_environment, read_ending, say, say_end
from distgpt.machine import default_ranks
from distgpt.run.exit_report import EXIT_FILE_VARIABLE, write_exit_report
from distgpt.run.paths import RunPaths


def launch(config: Config, arguments: Sequence[str]) -> int:
    """Train until the run is done or TRIES launches in a row made no new checkpoint. Returns the code of the run.

    Raises UsageError before anything starts.
    """
    ranks = count_from_environment("NPROC_PER_NODE", None) or default_ranks()
    limit = count_from_environment("TRIES", 3) or 3
    require_divisible_batch(config, ranks)
    paths, supervisor = RunPaths(config.run_dir), Supervisor()
    tries = Tries(limit, paths)
    # From here on the checkpoints in the run directory are this job's own.
    fresh = [] if tries.newest_checkpoint else ["--run.fresh=false"]
    with tempfile.TemporaryDirectory() as scratch:
        while True:
            ending = _attempt(config, [*arguments, *fresh], ranks, supervisor, Path(scratch))
            if supervisor.signalled or not ending.retryable:
                if ending.code != EXIT_OK:
                    say_end(ending)
                if supervisor.signalled and ending.cause == UNKNOWN_CAUSE:  # a second Ctrl-C killed the ranks
                    write_exit_report(paths, code=ending.code, cause=ending.cause, rank=0, step=None)
                return ending.code
            exhausted = tries.exhausted()
            say(ending.reason)
            if exhausted:
                say(f"gave up after {tries.count} launches that got no further: run it again to go on")
                return ending.code
            say(f"starting again from {tries.newest_checkpoint or 'the beginning'}")


def _attempt(config: Config, arguments: Sequence[str], ranks: int, supervisor: Supervisor, scratch: Path) -> Ending:
    """Train until torchrun ends."""
    # A file, where --standalone would listen on all interfaces: whoever can connect there can make torchrun run code.
    _, rendezvous = tempfile.mkstemp(dir=scratch)
    report = scratch / "exit.json"
    report.unlink(missing_ok=True)
    status = supervisor.run(
        [
            *(*TORCHRUN, f"--nproc_per_node={ranks}", "--max-restarts=3"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", f"--rdzv-id={Path(rendezvous).name}"),
            *("--rdzv-conf=store_type=file,keep_alive_interval=3600", "--local-addr=127.0.0.1"),
            *("-m", "distgpt.train", *arguments),
        ],
        environment={
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            EXIT_FILE_VARIABLE: str(report),
            # Each rank sets its own share of the threads; this only keeps torchrun from warning about it.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            # Seconds that ranks have to save once they are told to stop. torchrun's default is 30.
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"),
        },
        stopped_limit=config.health.timeout,
    )
    if status == 0:
        return Ending(EXIT_OK, "")
    return read_ending(report) or Ending(EXIT_INTERRUPTED, UNKNOWN_CAUSE)
