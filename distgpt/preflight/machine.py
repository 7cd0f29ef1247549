"""Are this machine, its data and its run directory fit to train? One finding a check, each with the fix.

hosts.py checks what several hosts must have in common, links.py how fast they reach each other.
"""

import dataclasses
import fcntl
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from distgpt.checkpoint.compatibility import require_same_run
from distgpt.checkpoint.manifest import committed
from distgpt.checkpoint.retention import CHECKPOINT_BYTES, OUTER_BYTES, checkpoint_bytes, require_space
from distgpt.config import Config
from distgpt.corpus.order import Order, evaluation_windows
from distgpt.corpus.shards import Dataset, Split, open_dataset, verify_dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.distributed.device import compute_dtype, threads_per_rank
from distgpt.distributed.plan import (
    BYTES_PER_PARAMETER,
    choose_strategy,
    independent_replicas,
    micro_batch_size,
    ranks_per_replica,
)
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DirectoryError, DistgptError, UsageError
from distgpt.model.gpt import count_parameters
from distgpt.preflight.finding import Finding, attempt, failure, found, warning
from distgpt.run.lock import lock_holder
from distgpt.run.paths import RunPaths
from distgpt.suggestion import MANY_EPOCHS, steps_of_many_epochs

# Of a device's memory that weights, gradients and moments may take before activations have too little.
COMFORTABLE_SHARE = 0.7
GIB = 2**30
# NCCL's buffers for the ranks of a host; a container has 64 MiB by default.
SHARED_MEMORY_BYTES = {"cuda": GIB, "cpu": 64 * 2**20}


def all_local_devices(runtime: Runtime) -> Runtime:
    """A plain process as the first rank of a job on all GPUs of this machine, as launch/local.sh would start it."""
    gpus = torch.cuda.device_count()
    return dataclasses.replace(runtime, world_size=gpus, local_world_size=gpus) if gpus > 1 else runtime


def check_machine(config: Config, runtime: Runtime, *, thorough: bool) -> Iterator[Finding]:
    """Every check that this machine can make by itself, as it is made. `thorough`: read all of the data."""
    yield found("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield attempt("torch", torch_version)
    yield attempt("devices", lambda: devices(config, runtime))
    yield attempt("batch", lambda: batch(config, runtime))
    yield attempt("shared memory", lambda: shared_memory(runtime))
    try:
        dataset = open_dataset(Path(config.data.path))
    except DistgptError as error:
        yield failure("data", error)
        return
    yield attempt("data", lambda: data(dataset, thorough=thorough))
    yield attempt("windows", lambda: windows(config, dataset))
    if runtime.rank == 0:
        yield attempt("run directory", lambda: run_directory(config, runtime, dataset))
    yield attempt("disk", lambda: disk(config, runtime, dataset))
    yield attempt("memory", lambda: memory(config, runtime, dataset))


def torch_version() -> Finding:
    """PyTorch and what it talks with. Raises UsageError if it cannot talk at all."""
    if not dist.is_available():
        raise UsageError(f"PyTorch {torch.__version__} was built without torch.distributed: install an official build")
    backends = [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    return found("torch", f"{torch.__version__}, backends {', '.join(backends)}")


def devices(config: Config, runtime: Runtime) -> Finding:
    """What a rank computes on, and in which precision."""
    dtype = str(compute_dtype(config.train.dtype, runtime.device)).removeprefix("torch.")
    if runtime.device.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        listed = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
        if runtime.local_world_size < len(names):
            return warning("devices", f"{listed}, {runtime.local_world_size} of them used: raise --nproc_per_node")
        return found("devices", f"{listed}, {dtype}")
    if Path("/dev/nvidia0").exists():
        built = torch.version.cuda
        why = f"PyTorch for CUDA {built} cannot use it: update the driver" if built else "PyTorch has no CUDA build"
        return warning("devices", f"there is an NVIDIA GPU, but {why}; training on the CPU")
    threads = threads_per_rank(runtime.local_world_size)
    return found("devices", f"{runtime.local_world_size} x cpu of {threads} threads, {dtype}")


def batch(config: Config, runtime: Runtime) -> Finding:
    """That the global batch divides over the ranks. Raises UsageError."""
    size, ranks = micro_batch_size(config, runtime), runtime.world_size
    steps = config.train.global_batch // (size * ranks)
    return found(
        "batch", f"{config.train.global_batch} = {ranks} ranks x {size} sequences x {steps} accumulation steps"
    )


def shared_memory(runtime: Runtime) -> Finding:
    """/dev/shm, through which the ranks of one host exchange data."""
    name, path = "shared memory", Path("/dev/shm")
    if sys.platform != "linux":
        return found(name, "not used on this system")
    fix = "start the container with --ipc=host or --shm-size=8g"
    if not path.is_dir() or not os.access(path, os.W_OK):
        return warning(name, f"{path} is missing or not writable: {fix}")
    free, wanted = shutil.disk_usage(path).free, SHARED_MEMORY_BYTES[runtime.device.type]
    if free < wanted:
        return warning(name, f"{path} has {_size(free)} free, {_size(wanted)} would be safe: {fix}")
    return found(name, f"{path} has {_size(free)} free")


def data(dataset: Dataset, *, thorough: bool) -> Finding:
    """That the data is what was prepared. Raises DataError."""
    load_tokenizer(dataset.path)
    about = f"{dataset.path}: {dataset.train.tokens:,} + {dataset.val.tokens:,} tokens"
    about += f", vocabulary {dataset.vocab_size:,}"
    if not thorough:
        return found("data", f"{about}, sizes right")
    verify_dataset(dataset, always=True)
    return found("data", f"{about}, every hash right")


def windows(config: Config, dataset: Dataset) -> Finding:
    """How many windows each split holds. Raises DataError if one holds none."""
    block_size, train, val = config.model.block_size, dataset.train, dataset.val
    order = Order(lengths(train), block_size=block_size, seed=config.run.seed, split=train.name)
    evaluated, _ = evaluation_windows(lengths(val), block_size, config.eval.sequences, val.name)
    epochs = config.train.steps * config.train.global_batch / order.windows
    text = f"{order.windows:,} of {block_size} tokens to train on, {len(evaluated):,} to evaluate on"
    times = f"{epochs:.3g}" if epochs < 100 else f"{epochs:,.0f}"
    text += f"; {config.train.steps:,} steps see the training text {times} times"
    if epochs > MANY_EPOCHS:
        fewer = steps_of_many_epochs(order.windows, config.train.global_batch)
        return warning(
            "windows", f"{text}: prepare more text, or see it {MANY_EPOCHS} times with --train.steps={fewer}"
        )
    return found("windows", text)


def lengths(split: Split) -> list[int]:
    """Tokens of each shard."""
    return [len(shard) for shard in split.shards]


def run_directory(config: Config, runtime: Runtime, dataset: Dataset) -> Finding:
    """That a run can be started or resumed in it. Leaves no trace. Raises DirectoryError, StorageError, UsageError."""
    paths = RunPaths(config.run_dir)
    if owner := lock_holder(paths):
        raise DirectoryError(f"{paths.root} is in use by {owner}; wait for it or choose another --run.dir")
    nearest = existing(paths.root)
    try:
        with tempfile.TemporaryFile(dir=nearest) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DirectoryError(
            f"cannot write to the run directory {paths.root} ({nearest}: {error.strerror}); choose another --run.dir"
        ) from None
    checkpoints = committed(paths.checkpoints)
    if not checkpoints:
        return found("run directory", f"{paths.root}, a new run")
    if config.run.fresh:
        raise DirectoryError(f"{paths.root} holds checkpoints: --run.fresh wants an empty run directory")
    require_same_run(paths.checkpoints, config, dataset, replicas=independent_replicas(config, runtime))
    return found("run directory", f"{paths.root}, to be resumed from {checkpoints[0].name}")


def disk(config: Config, runtime: Runtime, dataset: Dataset) -> Finding:
    """Room for the checkpoints. Raises StorageError if there is none for a single one."""
    paths = RunPaths(config.run_dir)
    nearest = existing(paths.root)
    one = checkpoint_bytes(count_parameters(config.model, dataset.vocab_size), independent_replicas(config, runtime))
    # The newest ones, the best one, and the one that is being written.
    wanted = config.checkpoint.keep + 2
    missing = max(1, wanted - len(committed(paths.checkpoints)))
    require_space(nearest, one)
    free = shutil.disk_usage(nearest).free
    text = f"{_size(free)} free at {nearest}, a checkpoint takes {_size(one)}"
    if free < missing * one:
        return warning("disk", f"{text} and up to {wanted} are kept: free some space or lower checkpoint.keep")
    return found("disk", text)


def memory(config: Config, runtime: Runtime, dataset: Dataset) -> Finding:
    """What a rank holds before the first activation, against its device. Raises UsageError if it cannot fit."""
    strategy, _ = choose_strategy(config, runtime, vocab_size=dataset.vocab_size)
    shards = ranks_per_replica(strategy, config, runtime)
    parameters = count_parameters(config.model, dataset.vocab_size)
    on_gpu = runtime.device.type == "cuda"
    # On a CPU the copy that a checkpoint is written from lies in the same memory.
    outer = OUTER_BYTES if strategy == "diloco" else 0
    each = BYTES_PER_PARAMETER + outer + (0 if on_gpu else CHECKPOINT_BYTES + outer)
    need = parameters * each / shards
    room = torch.cuda.mem_get_info(runtime.device)[0] if on_gpu else free_memory() / runtime.local_world_size
    text = f"{parameters:,} parameters, {strategy}: {_size(need)} of {_size(room)} free a rank"
    fix = "shard over more ranks with parallel.strategy=fsdp, or take a smaller model"
    if need > room:
        raise UsageError(f"{text}, before activations: {fix}")
    if need > COMFORTABLE_SHARE * room:
        return warning("memory", f"{text}, little is left for activations: lower train.micro_batch, or {fix}")
    return found("memory", text)


def existing(path: Path) -> Path:
    """`path`, or the nearest of its parents that exists. Raises DirectoryError if that is not a directory."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise DirectoryError(f"{nearest} is in the way of the run directory {path}: choose another --run.dir=DIR")
    return nearest


def free_memory() -> float:
    """Bytes that this process could still get: of the machine's, and of its control group's."""
    room = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        room = float(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        room = min(room, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        pass  # no such system, no such control group, or no limit ("max")
    return room


def _size(number: float) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1024:.0f} KiB"
