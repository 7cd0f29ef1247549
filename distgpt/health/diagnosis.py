"""Find out why a run hangs: how far each rank got, in which line it is, and for which ranks the others wait."""

import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RankProgress:
    """The progress of a rank, counted in heartbeats, its activity now, and its current line of Python."""

    rank: int
    host: str
    pid: int
    heartbeats: int
    activity: str
    line: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host}, {self.activity})"


def describe_hanging_ranks(
    answers: Sequence[RankProgress], world_size: int, stopped: Sequence[int] = (), gone: Sequence[int] = ()
) -> str:
    """Describe the ranks for which all the others wait.

    `stopped` and `gone` are ranks of this host that a signal has stopped, or that have ended.
    """
    if gone:
        return f"{_ranks(gone)} of {socket.gethostname()} gone"
    if stopped:
        return f"{_ranks(stopped)} of {socket.gethostname()} stopped by a signal"
    silent = sorted(set(range(world_size)) - {answer.rank for answer in answers})
    if silent:
        return f"{_ranks(silent)} did not answer: stopped, dead or cut off"
    behind = min(answer.heartbeats for answer in answers)
    last = [str(answer) for answer in answers if answer.heartbeats == behind]
    if len(last) < world_size:
        return f"{', '.join(last)} made less progress than the others"
    if world_size == 1:
        return last[0]
    return f"all ranks made equal progress ({answers[0].activity}): {_ranks_by_line(answers)}"


def write_flight_recorders(logs: Path, rank: int) -> None:
    """Write the last collectives of this rank for torch's `torchfrtrace`: those of gloo, and those of NCCL."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        # Private names, but those in the documentation of torch's flight recorder. Builds without GPUs lack NCCL's.
        c10d = torch._C._distributed_c10d
        for name, dump in (("", "_dump_fr_trace"), ("nccl-", "_dump_nccl_trace")):
            if hasattr(c10d, dump):
                (logs / f"flight-recorder-{name}rank-{rank}").write_bytes(getattr(c10d, dump)())


def current_line() -> str:
    """Return the innermost line of Python of the main thread, or of the thread that writes a checkpoint for it."""
    frames = sys._current_frames()
    frame = frames[threading.main_thread().ident or 0]
    # The module traceback would open source files, whose disk may hang.
    files, caller = [], frame.f_back
    while caller is not None:
        files.append(Path(caller.f_code.co_filename).name)
        caller = caller.f_back
    if "checkpointer.py" in files and Path(frame.f_code.co_filename).name == "threading.py":
        saving = [
            frames[t.ident] for t in threading.enumerate() if t.name.startswith("checkpoint") and t.ident in frames
        ]
        # A thread in thread.py is idle: it waits for the pool's next task.
        frame = next((busy for busy in saving if Path(busy.f_code.co_filename).name != "thread.py"), frame)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _ranks_by_line(answers: Sequence[RankProgress]) -> str:
    """List ranks by their line, the smallest group first: ranks in one backward pass have equally many heartbeats."""
    ranks: dict[str, list[int]] = {}
    for answer in answers:
        ranks.setdefault(answer.line, []).append(answer.rank)
    groups = sorted(ranks.items(), key=lambda item: len(item[1]))
    return "; ".join(f"{_ranks(sorted(members))} at {line}" for line, members in groups)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
