"""Fork small runs that kill or stop themselves at a chosen system call that changes a file.

Usage: `python fork_server.py DATASET`. A run acquires its run directory, resumes, trains one step, saves it, and exits.
This program imports torch once, and forks a process for each rank of each run. It reads requests as JSON lines and
answers each with a JSON line, see forked_runs.py.
"""

import builtins
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.reader import TrainingState
from distgpt.config import resolve
from distgpt.corpus.shards import Dataset, open_dataset
from distgpt.distributed.collectives import broadcast_from_rank_zero
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.health.outliers import OutlierFilter
from distgpt.model.optim import build_optimizer
from distgpt.run import lock
from distgpt.run.lock import Owner
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession
from distgpt.telemetry.metrics import Metrics
from tests.checkpoint.checkpoints import SMALL
from tests.forking import threads

CHANGING_CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "ftruncate", "truncate", "fsync")
UNWATCHED_OPEN = open
SIGNAL_OF: dict[str, signal.Signals] = {"kill": signal.SIGKILL, "tear": signal.SIGKILL, "stop": signal.SIGSTOP}


class Calls:
    """Counts and logs the calls that change a file, and kills or stops this process just before call number `at`.

    `how`: "kill", "stop" or "tear", which kills after half of a write. Calls of the lease's thread do not count: their
    order varies.
    """

    def __init__(self, log: Path, how: str, at: int) -> None:
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._write = os.write
        self._how, self._at, self._count = how, at, 0
        self._counting = threading.Lock()

    def watch(self) -> None:
        for name in CHANGING_CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        for name in ("write", "pwrite"):
            setattr(os, name, self._watched_write(name, getattr(os, name)))
        os.open = self._watched_open(os.open)
        builtins.open = io.open = self._opened

    def before(self, name: str, tear: Callable[[], object] = lambda: None) -> None:
        """Count and log a call that is about to be made; `tear` does half of it."""
        if threading.current_thread().name == "lease":
            return
        with self._counting:
            self._count += 1
            is_chosen = self._count == self._at
            self._write(self._log, f"{name}\n".encode())
        if is_chosen:
            if self._how == "tear":
                tear()
            os.kill(os.getpid(), SIGNAL_OF[self._how])

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            named_by = [os.readlink(f"/proc/self/fd/{arguments[0]}")] if name == "fsync" else arguments
            self.before(f"{name} {' '.join(str(a) for a in named_by if isinstance(a, str | Path))}")
            return call(*arguments, **named)

        return watched

    def _watched_write(self, name: str, call: Callable[..., int]) -> Callable[..., int]:
        def watched(fd: int, data: bytes, *rest: int) -> int:
            self.before(name, lambda: call(fd, bytes(data)[: len(data) // 2], *rest))
            return call(fd, data, *rest)

        return watched

    def _watched_open(self, call: Callable[..., int]) -> Callable[..., int]:
        def watched(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                self.before(f"open {path}")
            return call(path, flags, *rest, **named)

        return watched

    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wxa+"):
            return UNWATCHED_OPEN(file, mode, buffering, *rest, **named)
        self.before(f"open {file}")
        raw = WatchedFile(file, mode.replace("b", "").replace("t", ""))
        raw.calls = self
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, line_buffering=buffering == 1)


class WatchedFile(io.FileIO):
    """A file whose writes are counted when the buffer is flushed to it."""

    calls: Calls

    def write(self, data: Any) -> int:
        self.calls.before(f"write {self.name}", lambda: super(WatchedFile, self).write(bytes(data)[: len(data) // 2]))
        return super().write(data)


class SilentSession(RunSession):
    """A session that prints nothing on stdout, which is for the answers of main()."""

    def say(self, text: str) -> None:
        pass


def run_rank(directory: Path, dataset: Dataset, *, rank: int, world: int, report: Path) -> None:
    """Run one rank to the end. Writes the step at which it resumed and a digest of its weights to `report`."""
    config = resolve([*SMALL, "--train.micro_batch=1", "--parallel.strategy=fsdp"], {})
    runtime = Runtime(rank, rank, world, world, torch.device("cpu"))
    with SilentSession(RunPaths(directory), rank) as run:
        if rank == 0:
            run.acquire(lease=0.2)
        if world > 1:
            store = dist.FileStore(str(report.with_suffix(".store")), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        run.attach_logs(Owner(**broadcast_from_rank_zero(asdict(run.owner) if run.owner else {}, runtime)))
        plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
        model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=None)
        optimizer = build_optimizer(model, config.optim, "cpu")
        training = TrainingState(model, optimizer, OutlierFilter(config.health))
        checkpointer = Checkpointer(run, config, plan, dataset, training)
        step = checkpointer.restore()
        run.allow_graceful_stop()
        if rank == 0:
            with UNWATCHED_OPEN(report, "w") as file:
                json.dump({"step": step, "digest": digest(directory, step)}, file)
            metrics = Metrics(directory, resume_step=step, require_owned=run.require_owned)
        tokens_BT = torch.randint(0, 20, (4, 9), generator=torch.Generator().manual_seed(3))
        model(tokens_BT[:, :-1], tokens_BT[:, 1:]).mean().backward()
        optimizer.step()
        checkpointer.save(step + 1, val_loss=None)
        if rank == 0:
            metrics.evaluation(step=step + 1, val_loss=1.0, val_bits_per_byte=2.0)
        checkpointer.require_saved(step + 1)
        run.step = step + 1


def digest(directory: Path, step: int) -> str:
    """Return a digest of the tensor files of a checkpoint, empty at step 0."""
    files = sorted((directory / "checkpoints" / f"step-{step:08d}").glob("__*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else ""


def fork(request: dict[str, Any], dataset: Dataset, *, rank: int, report: Path, log: Path) -> int:
    """Fork a process for one rank of a run. Returns its process id."""
    pid = threads.fork_while_others_sleep()
    if pid:
        return pid
    with suppress(BaseException):
        if request["boot"]:
            lock.BOOT_ID = report.with_suffix(".boot")
            lock.BOOT_ID.write_text(request["boot"])
        calls = Calls(log, request["how"], request["at"] if rank == request["rank"] else 0)
        calls.watch()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        run_rank(Path(request["directory"]), dataset, rank=rank, world=request["world"], report=report)
        calls.before("end")
        os._exit(0)
    os._exit(99)


def main() -> NoReturn:
    torch.set_num_threads(1)
    dataset = open_dataset(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as first:  # this run imports what every fork needs
        run_rank(Path(first) / "run", dataset, rank=0, world=1, report=Path(first) / "report")
    stopped: tuple[list[int], Path, Path] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "wake" in request:
            assert stopped is not None
            pids, report, log = stopped
            os.kill(pids[0], signal.SIGCONT)
        else:
            place = Path(tempfile.mkdtemp(dir=request["scratch"]))
            report, log = place / "report", place / f"calls-{request['rank']}"
            pids = [
                fork(request, dataset, rank=r, report=report, log=place / f"calls-{r}") for r in range(request["world"])
            ]
        first = request.get("rank", 0)
        _, status = os.waitpid(pids[first], os.WUNTRACED)
        answer: dict[str, Any] = {"stopped": os.WIFSTOPPED(status), "code": 0}
        if os.WIFSTOPPED(status):
            stopped = (pids, report, log)
        else:
            for pid in pids:
                if pid != pids[first]:
                    if status:  # as torchrun would
                        os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            answer["code"] = os.waitstatus_to_exitcode(status)
        answer |= {"calls": log.read_text().splitlines() if log.exists() else []}
        answer |= json.loads(report.read_text()) if report.exists() else {"step": None, "digest": None}
        print(json.dumps(answer), flush=True)
        stopped = None if "wake" in request else stopped
    for pid in stopped[0] if stopped else ():
        os.kill(pid, signal.SIGKILL)
    sys.exit(0)


if __name__ == "__main__":
    main()
