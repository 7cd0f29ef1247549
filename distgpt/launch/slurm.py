"""Answer the scripts of slurm/, which call Slurm themselves. Imports no torch.

This may run in a container (DISTGPT_RUN), which has none of Slurm's commands. The last line on stdout is the answer,
since a container may print a greeting first.
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
from distgpt.corpus.shards import open_dataset
from distgpt.errors import EXIT_INTERRUPTED, EXIT_IO, DirectoryError, Interrupted, StorageError, UsageError
from distgpt.launch.policy import Ending, can_retry, newest_checkpoint, say
from distgpt.launch.settings import SIGNALS, TORCHRUN, count_from_environment, loopback_rendezvous, torchrun_environment
from distgpt.machine import available_gpus
from distgpt.preflight import network
from distgpt.run.exit_report import EXIT_FILE_VARIABLE, read_report
from distgpt.run.paths import RunPaths

# `scontrol show node` of this node.
NODE_VARIABLE = "DISTGPT_SLURM_NODE"
PROBE_BYTES = 4096
RESOURCES = ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE", "GPUS_ON_NODE")


def main(arguments: list[str]) -> int:
    """Print one answer and return the exit code. Raises UsageError if the environment of the job is missing."""
    try:
        match arguments:
            case ["attempt", *options]:
                print(in_bash(lay_out_attempt(options)))
            case ["node", module, *options]:
                run_on_this_node(module, options)
            case ["ending", logs, run_dir, steps, module, status]:
                ending = ending_of(Path(logs), run_dir, int(steps), module, int(status))
                cause = ending.cause_without_advice if ending.code == EXIT_INTERRUPTED else ending.cause
                print(ending.code, *cause.split())
            case ["progress", run_dir, steps]:
                print(progress(Path(run_dir), int(steps)))
            case _:
                raise UsageError("this answers the scripts in slurm/: sbatch slurm/train.sh ...")
    except KeyError as error:
        fix = "DISTGPT_RUN must pass the environment of the job into the container"
        raise UsageError(f"{error.args[0]} is not set: {fix}") from None
    return 0


def lay_out_attempt(options: list[str]) -> dict[str, str | list[str]]:
    """Check a job before any rank starts; return the variables of slurm/train.sh."""
    count_from_environment("NPROC_PER_NODE")  # a mistake is one line here, not one in the log of each node
    tries = count_from_environment("TRIES") or 5
    task, attempt = os.environ.get("SLURM_ARRAY_TASK_ID"), os.environ.get("SLURM_RESTART_COUNT") or "0"
    flags = sweep_flags(os.environ.get("DISTGPT_SWEEP", ""), int(task)) if task else []
    options = [*options, *flags]
    if attempt != "0":
        options.append("--run.fresh=false")  # what a later attempt finds in the run directory is the job's own
    check_resources(os.environ.get(NODE_VARIABLE, ""))
    config = resolve(options, os.environ)
    open_dataset(Path(config.data.path))
    run_dir = config.run_dir
    if task and "--run.dir" not in (flag.partition("=")[0] for flag in flags):
        run_dir = Path(f"{run_dir}-{task}")
        options.append(f"--run.dir={run_dir}")
    logs = RunPaths(run_dir).logs / f"slurm-{os.environ['SLURM_JOB_ID']}"
    mine = logs / f"attempt-{attempt}"
    try:
        mine.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise DirectoryError(f"cannot write to the run directory {run_dir}; choose another --run.dir") from None
    newest = newest_checkpoint(run_dir) or "no checkpoint"
    require_progress(logs, newest, tries)
    return {
        "run_dir": str(run_dir),
        "steps": str(config.train.steps),
        "mine": str(mine),  # the directory of this attempt's logs
        "newest": newest,
        "address": own_address(),
        "rendezvous_file": rendezvous_file() if os.environ["SLURM_NNODES"] == "1" else "",
        "options": options,  # all of distgpt.train
    }


def sweep_flags(path: str, task: int) -> list[str]:
    """Return the flags of a task of an array: a line of a file, with quotes as in a shell, and ends as any editor's.

    Raises UsageError.
    """
    why: object = "no flags"
    try:
        with open(path, encoding="utf-8-sig") as file:
            if flags := shlex.split(next(itertools.islice(file, task, None), "")):
                return flags
    except OSError:
        fix = "it must name a file with a line of flags for each task"
        raise UsageError(f"DISTGPT_SWEEP={path} cannot be read: {fix}") from None
    except ValueError as error:
        why = error
    raise UsageError(f"DISTGPT_SWEEP={path}: {why} in line {task + 1}, that of task {task} (from 0)")


def check_resources(node: str) -> None:
    """Say if the job has little of its node's memory. Raises UsageError if it has none of its GPUs."""
    name, job = os.environ["SLURMD_NODENAME"], {key: os.environ.get(f"SLURM_{key}") for key in RESOURCES}
    memory = int(job["MEM_PER_NODE"] or 0) + int(job["MEM_PER_CPU"] or 0) * int(job["CPUS_ON_NODE"] or 1)
    whole = re.search("RealMemory=([0-9]+)", node)
    if whole and 0 < 2 * memory < int(whole[1]):
        say(f"the job may use {memory} of the {whole[1]} MiB of memory of {name}: --mem=0 asks for all of it")
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
        gave_up = f"gave up after {tries} attempts that got no further than {newest}"
        raise Interrupted(f"{gave_up}, see {logs}: submit it again to go on")


def rendezvous_file() -> str:
    """Return a new file for torchrun's store, made where torchrun runs. Raises StorageError."""
    try:
        return tempfile.mkstemp()[1]
    except OSError:
        fix = "free some space or set TMPDIR, then submit the job again"
        raise StorageError(f"cannot create a temporary file on {os.environ['SLURMD_NODENAME']}: {fix}") from None


def own_address() -> str:
    """Return this node's address as Slurm knows it, at which the other nodes find it."""
    node = re.search(r"NodeAddr=(\S+)", os.environ.get(NODE_VARIABLE, ""))
    name = node[1] if node else socket.gethostname()
    address = ""
    with suppress(OSError):
        address = socket.gethostbyname(name)
    # Debian's /etc/hosts gives a host's own name a loopback address, where no other node finds it.
    if not address or (address.startswith("127.") and not name.startswith("127.")):
        return network.first_address() or address
    return address


def run_on_this_node(module: str, options: list[str]) -> None:
    """Become torchrun with a rank for each GPU that Slurm gave, or two that share the CPUs."""
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE") or available_gpus())
    cpus = int(os.environ.get("SLURM_CPUS_ON_NODE") or 1)
    ranks = count_from_environment("NPROC_PER_NODE") or gpus or min(2, cpus)
    nodes, interface = os.environ["SLURM_NNODES"], ""
    endpoint, job = os.environ["RENDEZVOUS_ENDPOINT"], os.environ["RENDEZVOUS_ID"]
    if nodes == "1":
        rendezvous = loopback_rendezvous(endpoint, job)
    else:
        # gloo and NCCL would pick one by the host's name, on some clusters a loopback or management network.
        try:
            interface = network.interface_of(own_address())
        except UsageError as error:
            say(str(error))
        # The static rendezvous reads no pickles. timeout: on a busy network file system Python may start minutes later
        # on one node than on another.
        rendezvous = ["--rdzv-backend=static", "--rdzv-conf=timeout=600", f"--node-rank={os.environ['SLURM_NODEID']}"]
        rendezvous += [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}"]
    env = torchrun_environment(
        Path(os.environ[EXIT_FILE_VARIABLE]),
        shutdown_seconds=150,
        interface=interface,
        own_store=nodes == "1",
        threads=max(1, cpus // ranks),  # a share of the CPUs that Slurm gave, not of all that the node has
    )
    # Says what went wrong where NCCL would only return an error; costs nothing while nothing does.
    env.setdefault("NCCL_DEBUG", "WARN")
    command = [*TORCHRUN, f"--nnodes={nodes}", f"--nproc_per_node={ranks}", "--max-restarts=0", *rendezvous, SIGNALS]
    os.execve(sys.executable, [*command, "-m", module, *options], env)


def ending_of(logs: Path, run_dir: str, steps: int, module: str, status: int) -> Ending:
    """Decide how an attempt ended: 0, 75 to start again, or the code with which to give up.

    Training has succeeded where a rank says so after the last step, and not where nothing failed: what never started
    does not either.
    """
    report = read_report(Path(os.environ[EXIT_FILE_VARIABLE]))
    ending = Ending.from_report(report, otherwise=f"no rank could say how it ended, see {logs}")
    if ending.code is None and status == 0 and module != "distgpt.train":
        return Ending(0, "")
    if ending.code is None and not can_write(logs):
        return Ending(EXIT_IO, f"cannot write in {run_dir}: make room and submit it again to go on")
    if ending.code == 0 and ending.step < steps:
        ending = Ending(None, f"ended at step {ending.step} of {steps}")
    # What is left of the last attempt may still hold the run directory on a node that was lost.
    restarted = (os.environ.get("SLURM_RESTART_COUNT") or "0") != "0"
    if can_retry(ending.code, lock_may_be_ours=restarted):
        return Ending(EXIT_INTERRUPTED, ending.cause)
    return ending


def can_write(logs: Path) -> bool:
    """Return whether there is room for a rank to say how it ended."""
    with suppress(OSError), tempfile.TemporaryFile(dir=logs, buffering=0) as probe:
        return probe.write(bytes(PROBE_BYTES)) == PROBE_BYTES
    return False


def progress(run_dir: Path, steps: int) -> str:
    """Return the newest training line for the job's comment, empty if there is none among the last ones."""
    lines: list[str] = []
    with suppress(OSError), RunPaths(run_dir).metrics.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - PROBE_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            found = json.loads(line)
            minutes, seconds = divmod(int((steps - found["step"]) * found["seconds"]), 60)
            hours, minutes = divmod(minutes, 60)
            left = f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{seconds:02d}"
            return f"step {found['step']}/{steps} loss {found['loss']:.4f} ETA {left}"
    return ""


def in_bash(variables: dict[str, str | list[str]]) -> str:
    """Return assignments for bash in one line: strings, and arrays for lists."""
    text = " ".join(
        f"{name}=({shlex.join(value)})" if isinstance(value, list) else f"{name}={shlex.quote(value)}"
        for name, value in variables.items()
    )
    return text.replace("\n", "'$'\\n''")
