"""The process group of all ranks: the store through which they meet, its start, and its end."""

import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from distgpt.distributed.device import keep_freed_memory, share_of_cpus, threads_per_rank
from distgpt.distributed.runtime import Runtime

# Rank 0 may hash a large corpus while the others wait, at the speed of its disk.
CHECKS_TIMEOUT = timedelta(days=1)
# The number of recent collectives that torch records in each rank, for the watchdog to write to a file.
FLIGHT_RECORDER_EVENTS = "2000"
LOOPBACK = "lo" if sys.platform == "linux" else "lo0"


@contextmanager
def process_group(
    runtime: Runtime, *, timeout: float, on_store: Callable[[dist.Store], None] = lambda store: None
) -> Iterator[None]:
    """Set up this process for its device and, with several ranks, join their process group. `timeout` in seconds.

    `on_store` gets the store that all ranks share as soon as there is one. Create models in a function that is called
    inside, so that they are freed before the group. If DDP's reducer holds the last reference, it destroys the group
    while it holds the GIL and can deadlock with a thread of gloo that frees tensors.
    """
    torch.set_num_threads(threads_per_rank(runtime.local_world_size))
    # Processes that torch.compile starts. By default each rank would start one for each CPU of the machine.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(32, share_of_cpus(runtime.local_world_size))))
    if runtime.device.type == "cpu":
        keep_freed_memory()
    elif runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    if not runtime.distributed:
        yield
        return
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER_EVENTS)
    if runtime.on_one_host:  # no other machine may connect
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK
    store = shared_store(runtime)
    on_store(store)
    _await_rank_zero(runtime, store)
    init_process_group(runtime, store, timeout)
    yield
    gc.collect()  # frees models that hooks and torch.compile tied into cycles
    # Not in a finally: after a failure of a peer this would wait for it.
    dist.destroy_process_group()


def init_process_group(runtime: Runtime, store: dist.Store, timeout: float) -> None:
    """Create torch's default process group of all ranks. `timeout`: seconds that a collective waits for a rank."""
    on_gpu = runtime.device.type == "cuda"
    if on_gpu:  # otherwise every rank of the host opens a context on the first GPU
        torch.cuda.set_device(runtime.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=runtime.rank,
        world_size=runtime.world_size,
        timeout=timedelta(seconds=timeout),
        device_id=runtime.device if on_gpu else None,
    )


def shared_store(runtime: Runtime) -> dist.Store:
    """Return a store for this attempt alone: gloo would read keys that earlier attempts left in torchrun's store."""
    if runtime.on_one_host and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _store_on_loopback(runtime)
    store: dist.Store = next(dist.rendezvous("env://", timeout=CHECKS_TIMEOUT))[0]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        # Rank 0 makes a new store in each attempt. A prefix could differ: agents of several hosts count restarts alone.
        return store
    return dist.PrefixStore(f"distgpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _store_on_loopback(runtime: Runtime) -> dist.Store:
    """Open a store that rank 0 keeps; torch's own would listen on all interfaces."""
    port = int(os.environ["MASTER_PORT"])
    if runtime.rank:
        return dist.TCPStore("127.0.0.1", port, timeout=CHECKS_TIMEOUT)
    # The store closes this descriptor.
    fd = socket.create_server(("127.0.0.1", port), backlog=1024).detach()
    return dist.TCPStore(
        "127.0.0.1", port, is_master=True, timeout=CHECKS_TIMEOUT, wait_for_workers=False, master_listen_fd=fd
    )


def _await_rank_zero(runtime: Runtime, store: dist.Store) -> None:
    """Wait until rank 0 has checked the data, which may take longer than any rank should wait later on.

    If rank 0 finds something wrong, it ends, and torchrun ends the ranks that wait here.
    """
    if runtime.rank == 0:
        store.set("checked", "yes")
    else:
        store.wait(["checked"], CHECKS_TIMEOUT)
