"""A rank and its torchrun: environment variables, a signal when it dies, files for errors. Imports no torch."""

import ctypes
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distgpt.errors import EXIT_USAGE, UsageError
from distgpt.files import parent_of, process_age, start_ticks

PR_SET_PDEATHSIG = 1
# Other ranks wait this many seconds for rank 0 to print the same error: once one rank has ended, torchrun ends all.
RANK_ZERO_SECONDS = 30.0
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def this_job() -> str | None:
    """Return an identifier of the torchrun that started this process, None without torchrun."""
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job != "none":  # torchrun's default, the same for all jobs without --rdzv-id
        return job
    with suppress(OSError):
        agent = os.getppid()
        return f"{socket.gethostname()}, pid {agent}, {start_ticks(agent)}"
    return None


def this_attempt() -> int:
    """Return how often this torchrun has restarted all ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start_of_attempt() -> float:
    """Return a Unix time at which no rank of this attempt had started on this host yet; 0 if unknown.

    torchrun makes the directory of an attempt anew before it starts the ranks. They may start seconds apart.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # DIRECTORY/attempt_N/RANK/error.json
        with suppress(OSError, IndexError):
            return Path(file).parents[1].stat().st_mtime
    age = process_age()
    return time.time() - age if age else 0.0


def die_with_agent() -> None:
    """Let the kernel SIGKILL this rank when its torchrun dies, so that it does not train on as an orphan."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    agent = os.getppid()
    signal_when_parent_dies(signal.SIGKILL)
    # The agent may have died before the call above took effect.
    if os.getppid() != agent:
        os.kill(os.getpid(), signal.SIGKILL)
    if not _may_have_torchrun_ancestor(agent):
        with suppress(OSError):
            print_cause("distgpt: error: TORCHELASTIC_RUN_ID is set, but no torchrun started this process: unset it")
        os._exit(EXIT_USAGE)


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent dies. Only Linux does so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def _may_have_torchrun_ancestor(pid: int) -> bool:
    """Tell whether a process or one of its ancestors may be torchrun: a wrapper may be between torchrun and its rank.

    A process that has loaded torch may be torchrun. An init process, which adopts orphans, has not loaded torch, or
    belongs to another user.
    """
    while pid:
        try:
            if os.stat(f"/proc/{pid}").st_uid == os.getuid() and "libtorch" in Path(f"/proc/{pid}/maps").read_text():
                return True
            pid = parent_of(pid)
        except PermissionError:
            return pid != 1
        except OSError:
            return False
    return False


def print_cause(line: str) -> None:
    """Print on stderr why this process ends, and make torchrun print it too."""
    print(line, file=sys.stderr, flush=True)
    record_cause(line)


def record_cause(line: str) -> None:
    """Make torchrun print `line` at the end of its own report, which is far below the output of the rank."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # The format of torch.distributed.elastic.multiprocessing.errors.
        error = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": error}))


@dataclass(frozen=True)
class Place:
    """The place of this process among the processes of its job."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1


def place_in_job() -> Place:
    """Read the place of this process from the environment; without a launcher, the only rank. Raises UsageError."""
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    listed = " ".join(f"{name}={value}" for name, value in given.items())
    unset = f"unset {' '.join(given)}, or start it with torchrun"
    if not all(value.isdecimal() for value in given.values()):
        raise UsageError(f"the environment has {listed}, which must be whole numbers: {unset}")
    place = Place(**{name.lower(): int(value) for name, value in given.items()})
    if place != Place() and not ("MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ):
        raise UsageError(f"the environment has {listed}, but no launcher started this process: {unset}")
    if place.rank >= place.world_size or place.local_rank >= place.local_world_size:
        raise UsageError(f"the environment has {listed}, which is not a rank of a job: {unset}")
    return place
