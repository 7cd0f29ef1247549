"""Settings of launchers in the environment, and those of torchrun."""

import os
import re
import sys
from pathlib import Path

from distgpt.errors import UsageError
from distgpt.run.exit_report import EXIT_FILE_VARIABLE

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# torchrun passes on only the signals that it is told of, and SIGUSR1 would kill it.
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


def count_from_environment(name: str) -> int | None:
    """Return the whole number in an environment variable, None where it is not set. Raises UsageError."""
    text = os.environ.get(name)
    if not text:
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise UsageError(f"{name}={text}: it must be a whole number from 1")
    return int(text)


def loopback_rendezvous(store: str, job: str) -> list[str]:
    """Return options of torchrun for one machine: a private file is its store, and it listens on loopback only.

    torchrun's rendezvous c10d unpickles what it reads from its store, so anyone who can write there can run code.
    """
    conf = "store_type=file,keep_alive_interval=3600"  # each keep-alive makes the file longer
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint={store}", f"--rdzv-id={job}"]
    return [*place, f"--rdzv-conf={conf}", "--local-addr=127.0.0.1"]


def torchrun_environment(
    report: Path, *, shutdown_seconds: int, interface: str = "", own_store: bool = True, threads: int = 1
) -> dict[str, str]:
    """Return the environment of a torchrun whose ranks write `report`. Variables that are set keep their values.

    `shutdown_seconds`: the time that ranks have to save once they are told to stop. torchrun's default is 30.
    `interface`: the one to the other hosts. `own_store`: the ranks do not share torchrun's store.
    """
    defaults = {
        # Each rank sets its own share of the threads if there is no better value; 1 keeps torchrun from warning.
        "OMP_NUM_THREADS": str(threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_seconds),
        # NCCL chooses InfiniBand ports by itself; its variable is for its first contact, and for plain Ethernet.
        **(dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface) if interface else {}),
    }
    unset = {name: value for name, value in defaults.items() if not os.environ.get(name)}
    # Restarted ranks need a store of their own: gloo would find stale addresses in the store of earlier ones.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if own_store else {}
    return {**os.environ, **unset, **store, EXIT_FILE_VARIABLE: str(report)}
