"""A run under launch/local.sh, and the random moments at which a storm strikes it."""

import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from tests import jobs

LOCAL = jobs.PROJECT / "launch" / "local.sh"
EVALUATE_EVERY = 10
# At most so many steps pass between two strikes.
STEPS_A_STRIKE = 12


class LocalRun:
    """A launch/local.sh that trains with two ranks in the run directory `run`."""

    def __init__(self, run: Path, data: Path, *flags: str, **variables: str) -> None:
        self.run = run
        # TRIES: restart, however often a strike comes before the first step.
        self._variables = {"NPROC_PER_NODE": "2", "TRIES": "1000000", **variables}
        every = (f"--eval.every={EVALUATE_EVERY}", "--checkpoint.every=4")
        self._flags = [*jobs.TINY, f"--data.path={data}", f"--run.dir={run}", *every, *flags]
        self._output = run.with_name(f"{run.name}.output")
        self.start()

    def start(self) -> None:
        """Start the launcher."""
        self._attempts_before = self.attempts() if self._output.exists() else 0
        with self._output.open("a") as output:
            self._process = subprocess.Popen(
                [LOCAL, *self._flags],
                stdout=output,
                stderr=output,
                env=jobs.environment(**self._variables),
            )

    @property
    def ended(self) -> bool:
        """True if the launcher has ended."""
        return self._process.poll() is not None

    def code(self) -> int:
        """Wait for the launcher and return its exit code."""
        return self._process.wait(timeout=3600)

    def output(self) -> str:
        """Return the output of all starts."""
        return self._output.read_text(errors="replace")

    def agent(self) -> int | None:
        """Return the process id of torchrun, None if there is none now."""
        for pid in _children(self._process.pid):
            with suppress(OSError):
                if b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    def ranks(self) -> dict[int, int]:
        """Return the process ids of the ranks that run now, by rank."""
        return jobs.ranks_of(self.agent() or self._process.pid)  # the latter is the relay of a forked launcher

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Send the launcher a signal, and stop rank 1 until rank 0 has received it.

        torchrun may pass the signal on after seconds, and a short run would end meanwhile.
        """
        before = self._stop_messages()
        held: int | None = None
        self._process.send_signal(number)

        def received() -> bool:
            nonlocal held
            if held is None and self.attempts() > self._attempts_before and (held := self.ranks().get(1)):
                with suppress(ProcessLookupError):
                    os.kill(held, signal.SIGSTOP)
            return self.ended or self._stop_messages() > before

        try:
            jobs.poll(received)
        finally:
            if held is not None:
                with suppress(ProcessLookupError):
                    os.kill(held, signal.SIGCONT)

    def _stop_messages(self) -> int:
        return len(re.findall("distgpt: (?:stopping|interrupted)", self.output()))

    def attempts(self) -> int:
        """Return how often the run has begun to train, from the start or from a checkpoint."""
        return len(re.findall("^(?:starting in|going on from step) ", self.output(), re.MULTILINE))

    def step(self) -> int:
        """Return the last step that was logged."""
        with suppress(OSError, ValueError, IndexError):
            with (self.run / "metrics.jsonl").open("rb") as metrics:
                metrics.seek(max(0, os.fstat(metrics.fileno()).st_size - 2000))
                lines = metrics.read().split(b"\n")
            return int(json.loads(lines[-2])["step"])
        return 0


def wait_for_moment(name: str, job: LocalRun, rng: random.Random) -> None:
    """Wait for a moment of this kind, or for the end of the job. "start" is a moment before the next step."""
    before, saved = job.step(), _checkpoint_names(job, "step-*")
    steps, over = rng.randint(1, 8), time.monotonic() + rng.uniform(0, 5)
    waits: dict[str, Callable[[], object]] = {
        "start": lambda: time.monotonic() > over or job.step() != before,
        "step": lambda: job.step() >= before + steps,
        "evaluation": lambda: job.step() > before and job.step() % EVALUATE_EVERY == 0,
        "save": lambda: _checkpoint_names(job, ".staging-*"),
        "commit": lambda: _checkpoint_names(job, "step-*") != saved,
    }
    while not (waits[name]() or job.ended):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.03))


def strikes(count: int, job: LocalRun, victims: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str, int]]:
    """Wait for `count` random moments. Yields the name of each, and a victim with its process id, for the strike."""
    for strike in range(count):
        name, victim = rng.choice(MOMENTS), rng.choice(victims)
        pid = None
        while pid is None:
            wait_for_moment(name, job, rng)
            assert not job.ended, f"before strike {strike}, {name} {victim}: {job.output()}"
            pid = job.agent() if victim == "agent" else job.ranks().get(int(victim[-1]))
        yield name, victim, pid


MOMENTS = ("start", "step", "evaluation", "save", "commit")


def assert_same_run(run: Path, other: Path) -> None:
    """Check that final weights, optimizer state and losses are equal bit for bit, and each step is logged once."""
    [last, expected] = (sorted((path / "checkpoints").glob("step-*"))[-1] for path in (run, other))
    jobs.assert_same_tensors(last, expected)
    assert jobs.losses(run) == jobs.losses(other)
    assert jobs.val_losses(run) == jobs.val_losses(other)
    assert _leftovers(run) == []


def table_rows(counted: Counter[tuple[str, str]], what: str) -> list[dict[str, object]]:
    """Return the numbers of strikes: a row for each moment, and a column for each victim or signal."""
    columns = sorted({column for _, column in counted})
    return [{what: name, **{column: counted[name, column] for column in columns}} for name in MOMENTS]


def _checkpoint_names(job: LocalRun, pattern: str) -> list[str]:
    return sorted(path.name for path in (job.run / "checkpoints").glob(pattern))


def _leftovers(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith("step-")]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
