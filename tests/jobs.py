"""Real processes for the tests: the doors, training jobs under torchrun, and what they leave behind."""

import fcntl
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.forking import client, program
from tests.forking.relay import RELAY

PROJECT = client.PROJECT
# For PYTHONPATH: any torchrun is replaced by a fork.
FORKED = f"{PROJECT}:{PROJECT / 'tests' / 'forking' / 'hook'}"

# Milliseconds a step, with everything that a resume could get wrong: dropout, accumulation, clipping.
TINY = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=16", "--model.dropout=0.1"),
    *("--train.global_batch=8", "--train.micro_batch=2", "--train.steps=60", "--train.dtype=float32"),
    *("--optim.lr=1e-3", "--optim.grad_clip=1.0", "--eval.every=20", "--eval.sequences=30", "--eval.sample_tokens=0"),
    *("--checkpoint.every=4", "--log.every=1", "--health.timeout=60"),
)
# distgpt.prepare with units of 64 KiB, so that a small corpus has many; workers import this file too.
SMALL_UNITS = """
from distgpt.cli import main_guard
from distgpt.corpus.reading import sources
from distgpt.prepare import main

sources.UNIT_BYTES = 2**16
if __name__ == "__main__":
    main_guard(main)
"""
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# What torchrun, Slurm or a person set for another job.
FOREIGN = ("DISTGPT_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_")

# The variables of a command that starts as a person starts it, not as a fork: jobs.command("train", **jobs.REAL).
REAL = {"PYTHONPATH": ""}
# Those of a script that looks for the children of its torchrun, which then is no fork; only its ranks are.
REAL_AGENT = {"FORK_SERVER": ""}

T = TypeVar("T")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets the size of a pipe")
_cores = itertools.cycle(sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [0])
if os.environ.get("PYTEST_XDIST_WORKER") == "gw1":
    next(_cores)  # not the core that the other worker begins with


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}"

    @property
    def error_lines(self) -> list[str]:
        """The lines on stderr that begin as a user's mistake is told."""
        return [line for line in self.stderr.splitlines() if line.startswith("distgpt: error: ")]

    @property
    def traceback(self) -> list[str]:
        """The lines on stderr that point into our own code; torchrun's report points into torch's."""
        return [line for line in self.stderr.splitlines() if f'File "{PROJECT}/distgpt/' in line]


class Job:
    """A job under way, which can run ahead of what was read from its stdout by 4 KiB and no further.

    So a test that reads up to a step knows that the job is still at work on one of the next 40 or so, however slow or
    fast the machine. Everything it does to the job is done to processes of its own, by id.
    """

    def __init__(self, command: Sequence[str], **variables: str) -> None:
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        self._stdout, self._said = read, b""
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the job)
        self._process = start(command, stdout=write, stderr=self._stderr.fileno(), variables=variables)
        os.close(write)
        self.pid = self._process.pid

    def read_until(self, text: str) -> None:
        """Read its stdout up to `text`."""
        while text.encode() not in self._said:
            assert self._read(), f"the job ended before it said {text!r}\n{self.finish()}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started, torchrun as a rule."""
        self._process.send_signal(number)

    def rank(self, rank: int) -> int:
        """The process id of a rank, as soon as there is one."""
        return poll(lambda: ranks_of(self.pid).get(rank))

    def finish(self) -> Ended:
        """Read on to the end, which comes when the last process that writes to this stdout is gone."""
        while self._read():
            pass
        code = self._process.wait()
        os.close(self._stdout)
        self._stderr.seek(0)
        return Ended(code, self._said.decode(), self._stderr.read())

    def _read(self) -> bool:
        chunk = os.read(self._stdout, 64)
        self._said += chunk
        return bool(chunk)


def start(
    command: Sequence[str], *, stdout: int, stderr: int, variables: Mapping[str, str], core: int | None = None
) -> client.Forked | subprocess.Popen[bytes]:
    """Start a command, on one core if so asked. Python is forked, unless its `variables` are for a real Python."""
    env = environment(**variables)
    if program.is_python(command) and not any(name.startswith(("PYTHON", "OMP_", "LC_")) for name in variables):
        with open(os.devnull) as nothing:
            return client.start(command, env=env, streams=(nothing.fileno(), stdout, stderr), core=core)

    def pin() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, preexec_fn=pin if core else None
    )


def run(command: Sequence[str], **variables: str) -> Ended:
    """Run a command to its end."""
    return _run(command, variables, core=None)


def command(name: str, *arguments: str | Path, **variables: str) -> Ended:
    """`python -m distgpt.<name>`, on one core: what is small is only slower on several."""
    core = next(_cores) if sys.platform == "linux" else None
    return _run([sys.executable, "-m", f"distgpt.{name}", *map(str, arguments)], variables, core=core)


def _run(command: Sequence[str], variables: Mapping[str, str], *, core: int | None) -> Ended:
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        started = start(command, stdout=stdout.fileno(), stderr=stderr.fileno(), variables=variables, core=core)
        code = started.wait()
        for stream in (stdout, stderr):
            stream.seek(0)
        return Ended(code, stdout.read(), stderr.read())


def torchrun(ranks: int, *arguments: str, **variables: str) -> Ended:
    """`torchrun -m distgpt.train` to its end."""
    return run(torchrun_command(ranks, *arguments), **variables)


def train(ranks: int, *arguments: str, **variables: str) -> Ended:
    """Train to the end, under torchrun or, with one rank, as a plain process."""
    return torchrun(ranks, *arguments, **variables) if ranks > 1 else command("train", *arguments, **variables)


def torchrun_command(ranks: int, *arguments: str, script: Path | None = None) -> list[str]:
    """The command line of a training job, with a rendezvous of its own; `script` stands for distgpt.train."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", SIGNALS]
    return [*launcher, *(["-m", "distgpt.train"] if script is None else [str(script)]), *arguments]


def all_at_once(jobs: Mapping[str, Callable[[], Ended]]) -> dict[str, Ended]:
    """Run several, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in running.items()}


def environment(**variables: str) -> dict[str, str]:
    """This one without what is meant for other jobs, and with a thread a rank: tests share few cores."""
    kept = {
        name: value for name, value in os.environ.items() if name == "DISTGPT_TORCH" or not name.startswith(FOREIGN)
    }
    forking = {"PYTHONPATH": FORKED, "FORK_SERVER": client.server().address}
    return {**kept, "OMP_NUM_THREADS": "1", **forking, **variables}


def poll(probe: Callable[[], T | None], seconds: float = 120.0) -> T:
    """What `probe` gives as soon as it is not None (nor False)."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)  # some probes look through all of /proc
    return found


def contents(directory: Path) -> dict[str, str]:
    """Name to hash of every file of a dataset."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def alive(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    try:
        return stat_of(pid)[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def disk(directory: Path, *options: str) -> Iterator[Path]:
    """A file system in memory there, with these options of mount; skips the test where it cannot be had."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting a file system takes root on Linux")
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "distgpt-test", str(directory)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", directory], check=True)


def fill(file: Path) -> None:
    """Let `file` grow until its disk is full."""
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """The training loss of each step; each step must be there once."""
    return _once((line["step"], line["loss"]) for line in metrics(run_dir) if "loss" in line)


def val_losses(run_dir: Path) -> dict[int, float]:
    """The validation loss of each evaluation; each must be there once."""
    return _once((line["step"], line["val_loss"]) for line in metrics(run_dir) if "val_loss" in line)


def exit_report(run_dir: Path) -> dict[str, Any]:
    """exit.json."""
    report: dict[str, Any] = json.loads((run_dir / "exit.json").read_text())
    return report


def checkpoints(run_dir: Path) -> list[str]:
    """The names of the checkpoints, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, read by torch's own loader."""
    index = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # it says that it reads as one process
        dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


def assert_same_tensors(a: Path, b: Path) -> None:
    """Two checkpoints hold the same weights and optimizer state, bit for bit."""
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert any(name.startswith("model.") for name in left)
    assert any("exp_avg_sq" in name for name in left)
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def _once(pairs: Any) -> dict[int, float]:
    listed = list(pairs)
    steps = [step for step, _ in listed]
    assert steps == sorted(set(steps)), f"steps {steps}"
    return dict(listed)


def environments() -> dict[int, dict[str, str]]:
    """The variables of each process on this machine that may be looked at, by its id."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            variables = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found[int(directory.name)] = dict(variable.split("=", 1) for variable in variables if "=" in variable)
    return found


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent and so on. Raises OSError where it has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def ranks_of(agent: int) -> dict[int, int]:
    """Process ids of the ranks that an agent started, by rank; the agent may be a relay that stands for it."""
    found = environments()
    agents = {pid for pid, its in found.items() if its.get(RELAY) == str(agent) and "RANK" not in its} | {agent}
    ranks = {}
    for pid, its in found.items():
        with suppress(OSError):
            if "RANK" in its and int(stat_of(pid)[1]) in agents:
                ranks[int(its["RANK"])] = pid
    return ranks
