"""Make the decisions of the scripts in slurm/, and print them for the scripts. Imports no torch.

The scripts call Slurm's commands, since this may run in a container (DISTGPT_RUN) that has none of them. They read only
the last line of stdout, since a container may print a greeting first.
"""

import itertools
import json
import os
import re
import shlex
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from distgpt.config import resolve
from distgpt.corpus.mixture import open_data
from distgpt.errors import EXIT_INTERRUPTED, EXIT_IO, DirectoryError, Interrupted, StorageError, UsageError
from distgpt.launch.policy import Ending, can_retry, newest_checkpoint, say
from distgpt.launch.settings import (
    SIGNALS_OPTION,
    TORCHRUN,
    count_from_environment,
    loopback_rendezvous,
    numa_options,
    torchrun_environment,
)
from distgpt.launch.sweep import directory_of_task
from distgpt.machine import available_gpus
from distgpt.preflight import network
from distgpt.run.exit_report import EXIT_FILE_VARIABLE, read_report
from distgpt.run.paths import RunPaths

# The scripts set this variable to the output of `scontrol show node` for this node.
NODE_VARIABLE = "DISTGPT_SLURM_NODE"
REPORT_BYTES = 4096  # enough for a rank's exit.json
METRICS_BYTES = 4096  # enough for the last lines of metrics.jsonl
RESOURCES = ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE", "GPUS_ON_NODE")


def main(arguments: list[str]) -> int:
    """Do what a script asks for; return the exit code. Raises UsageError if the environment of the job is missing."""
    try:
        match arguments:
            case ["attempt", *options]:
                print(bash_assignments(prepare_attempt(options)))
            case ["node", module, *options]:
                run_on_this_node(module, options)
            case ["ending", logs, run_dir, steps, module, status]:
                ending = ending_of(Path(logs), run_dir, int(steps), module, int(status))
                cause = ending.cause_without_advice if ending.code == EXIT_INTERRUPTED else ending.cause
                print(ending.code, *cause.split())
            case ["progress", run_dir, steps]:
                print(progress(Path(run_dir), int(steps)))
            case _:
                raise UsageError("only the scripts in slurm/ call this: sbatch slurm/train.sh ...")
    except KeyError as error:
        fix = "DISTGPT_RUN must pass the environment of the job into the container"
        raise UsageError(f"{error.args[0]} is not set: {fix}") from None
    return 0


def prepare_attempt(options: list[str]) -> dict[str, str | list[str]]:
    """Check a job before any rank starts; return the variables of slurm/train.sh."""
    numa_options(ranks_of_this_node())  # checked here, since each node would report a mistake in its own log
    tries = count_from_environment("TRIES") or 5
    task, attempt = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_RESTART_COUNT") or "0"
    flags = sweep_flags(os.environ.get("DISTGPT_SWEEP", ""), int(task)) if task else []
    options = [*options, *flags]
    if attempt != "0":
        options.append("--run.fresh=false")  # checkpoints that a later attempt finds are this job's own
    check_resources(os.environ.get(NODE_VARIABLE, ""))
    config = resolve(options, os.environ)
    open_data(config.data.path)
    run_dir = directory_of_task(config, flags, int(task)) if task else config.run_dir
    if run_dir != config.run_dir:
        options.append(f"--run.dir={run_dir}")
    logs = RunPaths(run_dir).logs / f"slurm-{os.environ['SLURM_JOB_ID']}"
    attempt_logs = logs / f"attempt-{attempt}"
    try:
        attempt_logs.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise DirectoryError(f"cannot write to the run directory {run_dir}; choose another --run.dir") from None
    newest = newest_checkpoint(run_dir) or "no checkpoint"
    require_progress(logs, newest, tries)
    return {
        "run_dir": str(run_dir),
        "steps": str(config.train.steps),
        "attempt_logs": str(attempt_logs),  # the directory of this attempt's logs
        "newest": newest,
        "address": own_address(),
        "rendezvous_file": rendezvous_file() if os.environ["SLURM_NNODES"] == "1" else "",
        "options": options,  # all of distgpt.train
    }


def sweep_flags(path: str, task: int) -> list[str]:
    """Return the flags of a task of an array: line `task`, from 0, of a file, with quotes as in a shell.

    Raises UsageError.
    """
    problem: object = "no flags"
    try:
        with open(path, encoding="utf-8-sig") as file:  # some editors write a byte order mark
            if flags := shlex.split(next(itertools.islice(file, task, None), "")):
                return flags
    except OSError:
        fix = "it must name a file with a line of flags for each task"
        raise UsageError(f"DISTGPT_SWEEP={path} cannot be read: {fix}") from None
    except ValueError as error:
        problem = error
    raise UsageError(f"DISTGPT_SWEEP={path}: {problem} in line {task + 1}, the line of task {task} (from 0)")


def check_resources(node: str) -> None:
    """Warn if the job has less than half of the node's memory. Raises UsageError if it has none of the node's GPUs.

    `node`: the output of `scontrol show node`.
    """
    name, job = os.environ["SLURMD_NODENAME"], {key: os.environ.get(f"SLURM_{key}") for key in RESOURCES}
    memory = int(job["MEM_PER_NODE"] or 0) + int(job["MEM_PER_CPU"] or 0) * int(job["CPUS_ON_NODE"] or 1)
    node_memory = re.search("RealMemory=([0-9]+)", node)
    if node_memory and 0 < 2 * memory < int(node_memory[1]):
        say(f"the job may use {memory} of the {node_memory[1]} MiB of memory of {name}: --mem=0 asks for all of it")
    if not (job["GPUS_ON_NODE"] or os.environ.get("NPROC_PER_NODE")) and re.search(r"Gres=\S*gpu", node):
        fix = "add --gpus-per-node=N, or NPROC_PER_NODE=2 for its CPUs"
        raise UsageError(f"{name} has GPUs and the job asked for none: {fix}")


def require_progress(logs: Path, newest: str, tries: int) -> None:
    """Raise Interrupted if the newest checkpoint is the same after `tries` attempts of this job in a row."""
    history = logs / "progress"
    try:
        with history.open("a") as file:
            file.write(f"{newest}\n")
        found = history.read_text().splitlines()
    except OSError:
        raise StorageError(f"cannot write in {logs}: make room and submit it again to go on") from None
    if found[-tries - 1 :].count(newest) > tries:
        gave_up = f"gave up after {tries} attempts without a new checkpoint (newest: {newest})"
        raise Interrupted(f"{gave_up}, see {logs}: submit it again to go on")


def rendezvous_file() -> str:
    """Create a file for torchrun's store, where torchrun runs, and return its path. Raises StorageError."""
    try:
        return tempfile.mkstemp()[1]
    except OSError:
        fix = "free some space or set TMPDIR, then submit the job again"
        raise StorageError(f"cannot create a temporary file on {os.environ['SLURMD_NODENAME']}: {fix}") from None


def own_address() -> str:
    """Return the address at which the other nodes reach this node: the one that Slurm knows, if that is usable."""
    node = re.search(r"NodeAddr=(\S+)", os.environ.get(NODE_VARIABLE, ""))
    name = node[1] if node else socket.gethostname()
    address = ""
    with suppress(OSError):
        address = socket.gethostbyname(name)
    # Debian's /etc/hosts gives a host's own name a loopback address, at which no other node reaches it.
    if not address or (address.startswith("127.") and not name.startswith("127.")):
        return network.first_address() or address
    return address


def cpus_of_this_node() -> int:
    """Return how many CPUs Slurm gave on this node."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or 1)


def ranks_of_this_node() -> int:
    """Return NPROC_PER_NODE, else one for each GPU that Slurm gave, else two that share the CPUs. Raises UsageError."""
    asked, gpus = count_from_environment("NPROC_PER_NODE"), os.environ.get("SLURM_GPUS_ON_NODE")
    return asked or int(gpus or available_gpus()) or min(2, cpus_of_this_node())


def run_on_this_node(module: str, options: list[str]) -> None:
    """Replace this process by torchrun, with the ranks of this node."""
    cpus, ranks = cpus_of_this_node(), ranks_of_this_node()
    nodes, interface = os.environ["SLURM_NNODES"], ""
    endpoint, job = os.environ["RENDEZVOUS_ENDPOINT"], os.environ["RENDEZVOUS_ID"]
    if nodes == "1":
        rendezvous = loopback_rendezvous(endpoint, job)
    else:
        # gloo and NCCL would choose by hostname, which on some clusters gives a loopback or management interface.
        try:
            interface = network.interface_of(own_address())
        except UsageError as error:
            say(str(error))
        # The static rendezvous reads no pickles. Its timeout is long, since on a busy network file system Python may
        # start minutes later on one node than on another.
        rendezvous = ["--rdzv-backend=static", "--rdzv-conf=timeout=600", f"--node-rank={os.environ['SLURM_NODEID']}"]
        rendezvous += [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}"]
    env = torchrun_environment(
        Path(os.environ[EXIT_FILE_VARIABLE]),
        shutdown_seconds=150,
        interface=interface,
        own_store=nodes == "1",
        threads=max(1, cpus // ranks),  # a share of the CPUs that Slurm gave, not of all that the node has
    )
    # With WARN, NCCL prints the reason of an error, and nothing else.
    env.setdefault("NCCL_DEBUG", "WARN")
    command = [
        *TORCHRUN,
        f"--nnodes={nodes}",
        f"--nproc_per_node={ranks}",
        *numa_options(ranks),
        "--max-restarts=0",
        *rendezvous,
        SIGNALS_OPTION,
    ]
    os.execve(sys.executable, [*command, "-m", module, *options], env)


def ending_of(logs: Path, run_dir: str, steps: int, module: str, status: int) -> Ending:
    """Decide how an attempt ended. The code is 0, 75 to start again, or the code with which to give up.

    Training has succeeded only if a rank reported it after the last step. The exit `status` of srun is not enough: it
    is 0 also if no rank ever started.
    """
    report = read_report(Path(os.environ[EXIT_FILE_VARIABLE]))
    ending = Ending.from_report(report, otherwise=f"no rank could report how it ended, see {logs}")
    if ending.code is None and status == 0 and module != "distgpt.train":
        return Ending(0, "")
    if ending.code is None and not can_write(logs):
        return Ending(EXIT_IO, f"cannot write in {run_dir}: make room and submit it again to go on")
    if ending.code == 0 and ending.step < steps:
        ending = Ending(None, f"ended at step {ending.step} of {steps}")
    # Ranks of the last attempt, on a node that was lost, may still hold the run directory.
    restarted = (os.environ.get("SLURM_RESTART_COUNT") or "0") != "0"
    if can_retry(ending.code, lock_may_be_ours=restarted):
        return Ending(EXIT_INTERRUPTED, ending.cause)
    return ending


def can_write(logs: Path) -> bool:
    """Tell whether a rank could write its report in `logs`."""
    with suppress(OSError), tempfile.TemporaryFile(dir=logs, buffering=0) as probe:
        return probe.write(bytes(REPORT_BYTES)) == REPORT_BYTES
    return False


def progress(run_dir: Path, steps: int) -> str:
    """Return step, loss and remaining time for the comment of the job; empty if the last lines have none."""
    lines: list[str] = []
    with suppress(OSError), RunPaths(run_dir).metrics.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - METRICS_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            found = json.loads(line)
            minutes, seconds = divmod(int((steps - found["step"]) * found["seconds"]), 60)
            hours, minutes = divmod(minutes, 60)
            left = f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{seconds:02d}"
            return f"step {found['step']}/{steps} loss {found['loss']:.4f} ETA {left}"
    return ""


def bash_assignments(variables: dict[str, str | list[str]]) -> str:
    """Return one line with an assignment for each variable, for bash: lists become arrays."""
    text = " ".join(
        f"{name}=({shlex.join(value)})" if isinstance(value, list) else f"{name}={shlex.quote(value)}"
        for name, value in variables.items()
    )
    return text.replace("\n", "'$'\\n''")
