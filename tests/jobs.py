"""Real processes for the tests: the commands, training jobs under torchrun, and the files that they leave."""

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
# A PYTHONPATH with which every torchrun is replaced by a fork.
FORKED = f"{PROJECT}:{PROJECT / 'tests' / 'forking' / 'hook'}"

# Steps of milliseconds, with everything that a resume could get wrong: dropout, accumulation, clipping.
TINY = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=16", "--model.dropout=0.1"),
    *("--train.global_batch=8", "--train.micro_batch=2", "--train.steps=36", "--train.dtype=float32"),
    *("--optim.lr=1e-3", "--optim.grad_clip=1.0", "--eval.every=12", "--eval.sequences=30", "--eval.sample_tokens=0"),
    *("--checkpoint.every=6", "--log.every=1", "--health.timeout=60"),
)
# A program: distgpt.prepare with units of 64 KiB, so that a small corpus has many. Worker processes import it too.
SMALL_UNITS = """
from distgpt.cli import main_guard
from distgpt.corpus.reading import sources
from distgpt.prepare import main

sources.UNIT_BYTES = 2**16
if __name__ == "__main__":
    main_guard(main)
"""
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# The beginnings of variables that torchrun, Slurm or a person set for another job.
FOREIGN = ("DISTGPT_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_")

# Variables for a command that starts its own Python instead of a fork: jobs.command("train", **jobs.NOT_FORKED).
NOT_FORKED: dict[str, Any] = {"PYTHONPATH": ""}
# Variables for a launcher that must be the parent of its torchrun: it is a fork, and forks its torchrun.
FORKED_LAUNCHER: dict[str, Any] = {"FORK_LAUNCHER": "1"}

T = TypeVar("T")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets the size of a pipe")
_cores = itertools.cycle(sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [0])


@dataclass(frozen=True)
class Ended:
    """The exit code and the output of a process that has ended."""

    code: int
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout ---\n{self.stdout}\n--- stderr ---\n{self.stderr}"

    @property
    def error_lines(self) -> list[str]:
        """The lines on stderr that report a user's mistake."""
        return [line for line in self.stderr.splitlines() if line.startswith("distgpt: error: ")]

    @property
    def traceback(self) -> list[str]:
        """The lines of tracebacks on stderr that name our own code; torchrun's report names torch's code."""
        return [line for line in self.stderr.splitlines() if f'File "{PROJECT}/distgpt/' in line]


class Job:
    """A running job whose stdout is a pipe for one line: it waits if it is further ahead of the reader.

    So a test that has read the line of a step knows that the job is in one of the next steps, on a machine of any
    speed. With `one_line=False`, for a job that is not read before its end, the pipe has 4 KiB. Signals go only to
    processes of this job, by id.
    """

    def __init__(self, command: Sequence[str], *, one_line: bool = True, **variables: Any) -> None:
        # With O_DIRECT each write takes a page, whatever its length.
        read, write = os.pipe2(os.O_DIRECT if one_line else 0)
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        self._stdout, self._output = read, b""
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the job)
        self._process = start(command, stdout=write, stderr=self._stderr.fileno(), variables=variables)
        os.close(write)
        self.pid = self._process.pid

    def read_until(self, text: str) -> None:
        """Read its stdout until `text` has appeared."""
        while text.encode() not in self._output:
            assert self._read(), f"the job ended before it printed {text!r}\n{self.finish()}"

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Send a signal during training, and return when rank 0 has received it."""
        self.signal(number)
        self.wait_for_stopping()

    def wait_for_stopping(self) -> None:
        """Return when rank 0 has received a signal to stop.

        torchrun may pass a signal on after seconds. Nobody reads stdout meanwhile, so rank 0 waits for its reader, and
        a short run does not end.
        """
        poll(lambda: b"distgpt: stopping after this step is saved" in self._stderr_so_far())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started, usually torchrun."""
        self._process.send_signal(number)

    def rank(self, rank: int) -> int:
        """Wait for a rank to start and return its process id."""
        return poll(lambda: ranks_of(self.pid).get(rank))

    def finish(self) -> Ended:
        """Read stdout until the last process that holds it has ended."""
        while self._read():
            pass
        code = self._process.wait()
        os.close(self._stdout)
        self._stderr.seek(0)
        return Ended(code, self._output.decode(), self._stderr.read())

    def _stderr_so_far(self) -> bytes:
        # pread does not move the offset, at which the job writes.
        return os.pread(self._stderr.fileno(), os.fstat(self._stderr.fileno()).st_size, 0)

    def _read(self) -> bool:
        chunk = os.read(self._stdout, 4096)
        self._output += chunk
        return bool(chunk)


def start(
    command: Sequence[str], *, stdout: int, stderr: int, variables: Mapping[str, str], core: int | None = None
) -> client.Forked | subprocess.Popen[bytes]:
    """Start a command, on `core` if given. Python is forked, unless `variables` has one that it reads at its start."""
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
    """Run `python -m distgpt.<name>` to its end, on one core: small work is only slower on several."""
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
    """Run `torchrun -m distgpt.train` to its end."""
    return run(torchrun_command(ranks, *arguments), **variables)


def train(ranks: int, *arguments: str, **variables: str) -> Ended:
    """Train to the end, under torchrun or, with one rank, as a plain process."""
    return torchrun(ranks, *arguments, **variables) if ranks > 1 else command("train", *arguments, **variables)


def torchrun_command(
    ranks: int, *arguments: str, script: Path | None = None, module: str = "distgpt.train"
) -> list[str]:
    """Return the command line of a job with its own rendezvous, of `module` or a `script`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", SIGNALS]
    return [*launcher, *(["-m", module] if script is None else [str(script)]), *arguments]


def run_all(jobs: Mapping[str, Callable[[], Ended]]) -> dict[str, Ended]:
    """Run several jobs to their end, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in running.items()}


def environment(**variables: str) -> dict[str, str]:
    """Return this environment without variables of other jobs, with one thread a rank: tests share few cores.

    Lines are as wide as in a wide terminal, so that a test finds a phrase on one line.
    """
    kept = {
        name: value for name, value in os.environ.items() if name == "DISTGPT_TORCH" or not name.startswith(FOREIGN)
    }
    forking = {"PYTHONPATH": FORKED, "FORK_SERVER": client.server().address}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **forking, **variables}


def poll(probe: Callable[[], T | None], seconds: float = 120.0) -> T:
    """Call `probe` until its result is true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, f"still {found!r} after {seconds:.0f} s"
        time.sleep(0.05)  # some probes look through all of /proc
    return found


def contents(directory: Path) -> dict[str, str]:
    """Return the hash of every file of a dataset, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def alive(pid: int) -> bool:
    """Return True if a process runs, False if it is a zombie or gone."""
    try:
        return stat_of(pid)[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def disk(directory: Path, *options: str) -> Iterator[Path]:
    """Mount a file system in memory on `directory`, with these mount options. Skips the test if that is impossible."""
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
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """Return the training loss of each step; checks that each step is logged once."""
    return _once((line["step"], line["loss"]) for line in metrics(run_dir) if "loss" in line)


def val_losses(run_dir: Path) -> dict[int, float]:
    """Return the validation loss of each evaluation; checks that each is logged once."""
    return _once((line["step"], line["val_loss"]) for line in metrics(run_dir) if "val_loss" in line)


def exit_report(run_dir: Path) -> dict[str, Any]:
    """Return the content of exit.json."""
    report: dict[str, Any] = json.loads((run_dir / "exit.json").read_text())
    return report


def checkpoints(run_dir: Path) -> list[str]:
    """Return the names in checkpoints/, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, unsharded, as torch's own loader reads it."""
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
    """Check that two checkpoints hold the same weights and optimizer state, bit for bit."""
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
    """Return the environment of each process on this machine that we may read, by process id."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            variables = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found[int(directory.name)] = dict(variable.split("=", 1) for variable in variables if "=" in variable)
    return found


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name: state, parent and so on. Raises OSError if it has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def ranks_of(agent: int) -> dict[int, int]:
    """Return the process ids of the ranks that an agent (torchrun) started, by rank. `agent` may be its relay."""
    found = environments()
    agents = {pid for pid, its in found.items() if its.get(RELAY) == str(agent) and "RANK" not in its} | {agent}
    ranks = {}
    for pid, its in found.items():
        with suppress(OSError):
            if "RANK" in its and int(stat_of(pid)[1]) in agents:
                ranks[int(its["RANK"])] = pid
    return ranks
