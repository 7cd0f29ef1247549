"""Environment variables of launchers, and options and environment of torchrun."""

import os
import re
import subprocess
import sys
from pathlib import Path

from distgpt.errors import UsageError
from distgpt.machine import available_gpus
from distgpt.run.exit_report import EXIT_FILE_VARIABLE

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# torchrun passes on only the signals in this option. Without it, SIGUSR1 would kill torchrun.
SIGNALS_OPTION = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
# What torchrun's --numa-binding knows.
NUMA_BINDINGS = ("node", "socket", "exclusive", "core-complex")


def count_from_environment(name: str) -> int | None:
    """Return the whole number in an environment variable, None where it is not set. Raises UsageError."""
    text = os.environ.get(name)
    if not text:
        return None
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise UsageError(f"{name}={text}: it must be a whole number from 1")
    return int(text)


def numa_options(ranks: int) -> list[str]:
    """Return torchrun's option to bind each of the ranks of this host to the CPUs near its GPU, as NUMA_BINDING asks.

    Not by default: torchrun ends with a traceback where one of the conditions below does not hold. Raises UsageError.
    """
    binding = os.environ.get("NUMA_BINDING")
    if not binding:
        return []
    asked = f"NUMA_BINDING={binding}"
    if binding not in NUMA_BINDINGS:
        raise UsageError(f"{asked}: it must be {', '.join(NUMA_BINDINGS[:-1])} or {NUMA_BINDINGS[-1]}")
    if (gpus := available_gpus()) < ranks:
        raise UsageError(f"{asked} needs a GPU for each rank (ranks: {ranks}, GPUs: {gpus}): unset it")
    # Containers often lack the program, or the right to use it.
    try:
        tried = subprocess.run(["numactl", "--physcpubind=+0", "true"], capture_output=True, text=True, timeout=30)
        said = tried.stderr.strip().partition("\n")[0]
        problem = f"exit code {tried.returncode}: {said}" if tried.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        fix = "install it, let the container use it, or unset NUMA_BINDING"
        raise UsageError(f"{asked} needs the program numactl, which does not work here ({problem}): {fix}")
    return [f"--numa-binding={binding}"]


def loopback_rendezvous(store: str, job: str) -> list[str]:
    """Return torchrun's options for one machine. The file `store` is its store, and it listens on loopback only.

    torchrun's c10d rendezvous unpickles what it reads from its store, so anyone who can write there can run code.
    """
    conf = "store_type=file,keep_alive_interval=3600"  # each keep-alive makes the file longer
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint={store}", f"--rdzv-id={job}"]
    return [*rendezvous, f"--rdzv-conf={conf}", "--local-addr=127.0.0.1"]


def torchrun_environment(
    report: Path, *, shutdown_seconds: int, interface: str = "", own_store: bool = True, threads: int = 1
) -> dict[str, str]:
    """Return the environment of a torchrun whose ranks write `report`. Variables that are set keep their values.

    `shutdown_seconds`: the time that ranks have to save after a signal to stop. torchrun's default is 30.
    `interface`: the network interface to the other hosts. `own_store`: the ranks do not share torchrun's store.
    `threads`: the OpenMP threads of each rank.
    """
    defaults = {
        # Without this variable torchrun prints a warning. With 1, a rank takes an even share of the CPUs.
        "OMP_NUM_THREADS": str(threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_seconds),
        # NCCL chooses InfiniBand ports by itself. It uses this interface to connect at first, and without InfiniBand.
        **(dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), interface) if interface else {}),
    }
    unset = {name: value for name, value in defaults.items() if not os.environ.get(name)}
    # Restarted ranks need a store of their own: gloo would find stale addresses in the store of earlier ones.
    store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if own_store else {}
    return {**os.environ, **unset, **store, EXIT_FILE_VARIABLE: str(report)}
