"""Checks of one machine, its data and its run directory. Each failure names its fix."""

import dataclasses
import fcntl
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from distgpt.checkpoint.compatibility import newest_state, require_same_run, with_choices_of
from distgpt.checkpoint.manifest import committed
from distgpt.checkpoint.store import require_space
from distgpt.config import Config
from distgpt.corpus.mixture import open_data
from distgpt.corpus.order import Order, evaluation_windows
from distgpt.corpus.shards import Dataset, verify_dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.distributed.device import compute_dtype, device_name, threads_per_rank
from distgpt.distributed.memory import OUTER_BYTES_PER_PARAMETER, checkpoint_bytes, moments
from distgpt.distributed.plan import (
    choose_strategy,
    independent_replicas,
    micro_batch_size,
    ranks_per_replica,
)
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DirectoryError, DistgptError, StorageError, UsageError
from distgpt.model.gpt import count_parameters
from distgpt.preflight.finding import Finding, failure, ok, run_check, warning
from distgpt.run.lock import lock_holder
from distgpt.run.paths import RunPaths
from distgpt.suggestion import MANY_EPOCHS, steps_of_many_epochs
from distgpt.units import count_text, ranks_text, size_text

# Weights, gradients and moments should take at most this share of a device's memory; activations need the rest.
MAX_STATE_SHARE = 0.7
GIB = 2**30
# NCCL's buffers for the ranks of a host need this much. A container has 64 MiB by default.
SHARED_MEMORY_BYTES = {"cuda": GIB, "mps": 0, "cpu": 64 * 2**20}


def all_local_devices(runtime: Runtime) -> Runtime:
    """Return the runtime of rank 0 of a job on all GPUs of this machine, as launch/local.sh would start it."""
    gpus = torch.cuda.device_count()
    return (
        dataclasses.replace(runtime, world_size=gpus, local_world_size=gpus)
        if runtime.device.type == "cuda" and gpus > 1
        else runtime
    )


def check_machine(config: Config, runtime: Runtime, *, thorough: bool) -> Iterator[Finding]:
    """Run the checks that need no other machine; yield each finding as it is made. `thorough`: read all of the data."""
    config = with_choices_of_run(config, runtime)
    yield ok("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield run_check("torch", check_torch)
    yield run_check("devices", lambda: check_devices(config, runtime))
    yield run_check("batch", lambda: check_batch(config, runtime))
    yield run_check("shared memory", lambda: check_shared_memory(runtime))
    try:
        dataset = open_data(config.data.path)
    except DistgptError as error:
        yield failure("data", error)
        return
    yield run_check("data", lambda: check_data(dataset, thorough=thorough))
    yield run_check("windows", lambda: check_windows(config, dataset))
    if runtime.rank == 0:
        yield run_check("run directory", lambda: check_run_directory(config, runtime, dataset))
    yield run_check("disk", lambda: check_disk(config, runtime, dataset))
    yield run_check("memory", lambda: check_memory(config, runtime, dataset))


def with_choices_of_run(config: Config, runtime: Runtime) -> Config:
    """Return the config with the data type and the micro-batch of the run that it resumes, if any."""
    with suppress(StorageError):  # check_run_directory() reports it
        if state := newest_state(RunPaths(config.run_dir).checkpoints):
            return with_choices_of(state, config, ranks=runtime.world_size)
    return config


def check_torch() -> Finding:
    """Report the version of PyTorch and its backends. Raises UsageError if it has no torch.distributed."""
    if not dist.is_available():
        raise UsageError(f"PyTorch {torch.__version__} was built without torch.distributed: install an official build")
    backends = [name for name in ("gloo", "nccl") if dist.is_backend_available(name)]
    return ok("torch", f"{torch.__version__}, backends {', '.join(backends)}")


def check_devices(config: Config, runtime: Runtime) -> Finding:
    """Report the devices of this host's ranks and the data type that they compute in."""
    dtype = str(compute_dtype(config.train.dtype, runtime.device)).removeprefix("torch.")
    if runtime.device.type == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        listed = ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names)))
        if runtime.local_world_size < len(names):
            used = f"{listed}; this job uses {runtime.local_world_size}"
            return warning("devices", f"{used}: set --nproc_per_node={len(names)} to use all")
        return ok("devices", f"{listed}, {dtype}")
    if runtime.device.type == "mps":
        return ok("devices", f"{device_name(runtime.device)}, {dtype}")
    if config.train.device == "auto" and Path("/dev/nvidia0").exists():
        built = torch.version.cuda
        why = f"for CUDA {built} cannot use it: update the driver" if built else "was built without CUDA"
        return warning("devices", f"this machine has an NVIDIA GPU, but PyTorch {why}; training uses the CPU")
    threads = threads_per_rank(runtime.local_world_size)
    return ok("devices", f"{runtime.local_world_size} x CPU with {threads} threads, {dtype}")


def check_batch(config: Config, runtime: Runtime) -> Finding:
    """Check that the global batch divides over the ranks. Raises UsageError."""
    batch, size, ranks = config.train.global_batch, micro_batch_size(config, runtime), runtime.world_size
    steps = batch // (size * ranks)
    return ok("batch", f"{batch} = {ranks_text(ranks)} x {size} sequences x {steps} accumulation steps")


def check_shared_memory(runtime: Runtime) -> Finding:
    """Check the free space of /dev/shm, through which the ranks of one host exchange data."""
    name, path = "shared memory", Path("/dev/shm")
    if sys.platform != "linux":
        return ok(name, "not used on this system")
    fix = "start the container with --ipc=host or --shm-size=8g"
    if not path.is_dir() or not os.access(path, os.W_OK):
        return warning(name, f"{path} is missing or not writable: {fix}")
    free, wanted = shutil.disk_usage(path).free, SHARED_MEMORY_BYTES[runtime.device.type]
    if free < wanted:
        return warning(name, f"{path} has {size_text(free)} free, the ranks may need {size_text(wanted)}: {fix}")
    return ok(name, f"{path} has {size_text(free)} free")


def check_data(dataset: Dataset, *, thorough: bool) -> Finding:
    """Check the sizes of the data files, or their checksums if `thorough`. Raises DataError."""
    load_tokenizer(dataset.path)
    about = f"{dataset}: {dataset.train.tokens:,} + {dataset.val.tokens:,} tokens"
    about += f", vocabulary {dataset.vocab_size:,}"
    if not thorough:
        return ok("data", f"{about}, all file sizes match")
    verify_dataset(dataset, always=True)
    return ok("data", f"{about}, all checksums match")


def check_windows(config: Config, dataset: Dataset) -> Finding:
    """Count the windows of each split, and the epochs. Raises DataError if a split holds none."""
    block_size, batch, texts, fixes = config.model.block_size, config.train.global_batch, [], []
    for train, val in zip(dataset.train.parts, dataset.val.parts, strict=True):
        windows = Order(train.lengths, block_size=block_size, seed=config.run.seed, split=train.split).windows
        sequences = max(1, round(config.eval.sequences * val.share))
        evaluated, _ = evaluation_windows(val.lengths, block_size, sequences, val.split)
        epochs = config.train.steps * batch * train.share / windows
        text = f"{windows:,} of {block_size} tokens for training, {len(evaluated):,} for evaluation"
        text += f"; {config.train.steps:,} steps read the training text {count_text(epochs)} times"
        texts.append(f"{train.name}: {text}" if train.name else text)
        if round(epochs) > MANY_EPOCHS:
            fewer = steps_of_many_epochs(round(windows / train.share), batch)
            fixes.append(f"prepare more text, or read it {MANY_EPOCHS} times with --train.steps={fewer}")
    text = "; ".join(texts)
    return warning("windows", f"{text}: {fixes[-1]}") if fixes else ok("windows", text)


def check_run_directory(config: Config, runtime: Runtime, dataset: Dataset) -> Finding:
    """Check that a run can start or resume in the run directory. Leaves no file behind.

    Raises DirectoryError, StorageError or UsageError.
    """
    paths = RunPaths(config.run_dir)
    fix = "choose another --run.dir"
    if owner := lock_holder(paths):
        raise DirectoryError(f"the run directory {paths.root} is in use by {owner}; wait for it or {fix}")
    nearest = nearest_directory(paths.root)
    try:
        with tempfile.TemporaryFile(dir=nearest) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        where = f"the run directory {paths.root} ({nearest}: {error.strerror})"
        raise DirectoryError(f"cannot write to {where}; {fix}") from None
    checkpoints = committed(paths.checkpoints)
    if not checkpoints:
        return ok("run directory", f"{paths.root}, a new run")
    if config.run.fresh:
        raise DirectoryError(f"{paths.root} holds checkpoints: --run.fresh needs an empty run directory; {fix}")
    require_same_run(paths.checkpoints, config, dataset, replicas=independent_replicas(config, runtime))
    return ok("run directory", f"{paths.root}, resumes from {checkpoints[0].name}")


def check_disk(config: Config, runtime: Runtime, dataset: Dataset) -> Finding:
    """Check the free space for checkpoints. Raises StorageError if not even one fits."""
    paths = RunPaths(config.run_dir)
    nearest = nearest_directory(paths.root)
    size = checkpoint_bytes(config, dataset.vocab_size, independent_replicas(config, runtime))
    # The newest ones, the best one, and the one that is being written are on the disk at the same time.
    most = config.checkpoint.keep + 2
    missing = max(1, most - len(committed(paths.checkpoints)))
    require_space(nearest, size)
    free = shutil.disk_usage(nearest).free
    text = f"{size_text(free)} free at {nearest}, one checkpoint needs {size_text(size)}"
    if free < missing * size:
        return warning("disk", f"{text} and up to {most} are kept: free some space or lower checkpoint.keep")
    return ok("disk", text)


def check_memory(config: Config, runtime: Runtime, dataset: Dataset) -> Finding:
    """Compare a rank's weights, gradients and moments with its free memory. Raises UsageError if they do not fit."""
    strategy, _ = choose_strategy(config, runtime, vocab_size=dataset.vocab_size)
    shards = ranks_per_replica(strategy, config, runtime)
    parameters = count_parameters(config.model, dataset.vocab_size)
    on_gpu = runtime.device.type == "cuda"
    outer = OUTER_BYTES_PER_PARAMETER if strategy == "diloco" else 0
    kept = parameters * (4 + outer) + 4 * moments(config, dataset.vocab_size, 1)
    # Without a GPU, the copy from which a checkpoint is written is in the same memory.
    need = (4 * parameters + kept + (0 if on_gpu else kept)) / shards
    room = torch.cuda.mem_get_info(runtime.device)[0] if on_gpu else free_memory() / runtime.local_world_size
    text = f"{parameters:,} parameters, {strategy}: a rank needs {size_text(need)} of {size_text(room)} free"
    fix = "shard over more ranks with parallel.strategy=fsdp, or take a smaller model"
    if need > room:
        raise UsageError(f"{text}, without activations: {fix}")
    if need > MAX_STATE_SHARE * room:
        return warning("memory", f"{text}, little is left for activations: lower train.micro_batch, or {fix}")
    return ok("memory", text)


def nearest_directory(path: Path) -> Path:
    """Return `path`, or if it does not exist its nearest existing parent. Raises DirectoryError if that is a file."""
    nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise DirectoryError(f"{nearest} is not a directory, so {path} cannot be created: choose another --run.dir")
    return nearest


def free_memory() -> float:
    """Return the bytes that this process can still allocate, limited by the machine and by its control group."""
    room = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        room = float(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        room = min(room, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError, KeyError):
        pass  # not Linux, no such control group, or no limit ("max")
    return room
