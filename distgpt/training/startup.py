"""The checks and the set-up before the first step."""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from distgpt.checkpoint.compatibility import require_same_run, with_choices_of
from distgpt.checkpoint.manifest import RunState, committed
from distgpt.checkpoint.store import require_space, require_writable
from distgpt.config import Config, shares_of, to_dict, to_toml
from distgpt.corpus.loader import EvaluationBatches, Loader
from distgpt.corpus.mixture import open_data
from distgpt.corpus.shards import Dataset, SplitName, verify_dataset
from distgpt.distributed.collectives import (
    all_gather_row,
    broadcast_from_rank_zero,
    hosts_of_ranks,
    require_agreement,
)
from distgpt.distributed.memory import checkpoint_bytes
from distgpt.distributed.parallelize import unwrap_model
from distgpt.distributed.plan import Plan, independent_replicas, make_plan, smaller_micro_batch
from distgpt.distributed.runtime import Runtime, restarted
from distgpt.errors import DataError, DirectoryError, StorageError, UsageError
from distgpt.files import write_file
from distgpt.health.watchdog import JOINING, Watchdog
from distgpt.planning.grade import grade
from distgpt.run.lock import Owner
from distgpt.run.session import NFS_ATTRIBUTE_CACHE_SECONDS, RunSession
from distgpt.telemetry.progress import Progress
from distgpt.training.step_report import peak_tokens_per_second
from distgpt.training.summary import warnings
from distgpt.units import ranks_text

log = logging.getLogger("distgpt")

# Bytes a second. The watchdog treats a slower disk as one that hangs.
SLOWEST_DISK = 1e6


def check_rank(config: Config, plan: Plan, dataset: Dataset, session: RunSession, watchdog: Watchdog) -> None:
    """Check the run directory, the data and the disk on rank 0, before it joins the other ranks, which wait.

    Raises DirectoryError, DataError or StorageError.
    """
    paths, timeout = session.paths, config.health.start_timeout
    if plan.runtime.rank:
        watchdog.heartbeat("waiting for rank 0 to check the data", math.inf)
        return
    session.acquire()
    if config.run.fresh and not restarted() and committed(paths.checkpoints):
        raise DirectoryError(f"{paths.root} holds checkpoints: --run.fresh wants an empty run directory")
    require_writable(paths.checkpoints)
    watchdog.heartbeat("verifying the data", timeout + (dataset.train.bytes + dataset.val.bytes) / SLOWEST_DISK)
    verify_dataset(dataset)
    needed = checkpoint_bytes(config, dataset.vocab_size, plan.independent_replicas)
    try:
        require_space(paths.root, needed)
    except StorageError as error:  # a warning, since there may be room by the time of the first save
        warn(str(error))
    watchdog.heartbeat(JOINING, timeout)


def check_agreement(config: Config, plan: Plan, dataset: Dataset, session: RunSession, watchdog: Watchdog) -> None:
    """Check that all ranks have the same config, data and run directory, then open their logs. All ranks call it.

    Raises UsageError or DirectoryError on all ranks.
    """
    watchdog.heartbeat(
        "comparing the config with the other ranks", config.health.start_timeout + NFS_ATTRIBUTE_CACHE_SECONDS
    )
    compared = to_dict(config)
    del compared["run"]["fresh"]  # launchers clear it when they restart a job
    layout = [plan.micro_batch, plan.strategy, plan.reshard, plan.reduce_each]
    # They follow from the memory of a device, in which ranks may differ.
    set_by_memory = "layout for its memory (set train.micro_batch and parallel.*)"
    require_agreement({**compared, "data": dataset.fingerprint, set_by_memory: layout}, plan.runtime)
    require_same_dtype(plan)
    owner = Owner(**broadcast_from_rank_zero(asdict(session.owner) if session.owner else {}, plan.runtime))
    _require_shared_directory(session, owner, plan.runtime)
    session.attach_logs(owner)


def require_same_dtype(plan: Plan) -> None:
    """Raise UsageError on all ranks if train.dtype=auto differs between them, as it can on unlike hosts."""
    with_bfloat16, without = _hosts_with_and_without(plan.dtype == torch.bfloat16, plan.runtime)
    if with_bfloat16 and without:
        raise UsageError(f"train.dtype=auto is float32 on {without} and bfloat16 elsewhere: set --train.dtype=float32")


def _require_shared_directory(session: RunSession, owner: Owner, runtime: Runtime) -> None:
    """Raise DirectoryError on all ranks unless all of them see the run directory that rank 0 took as `owner`."""
    _, without = _hosts_with_and_without(session.sees_same_directory(owner), runtime)
    if without:
        raise DirectoryError(f"{without} does not see {session.paths.root}: is it on a shared disk?")


def _hosts_with_and_without(has: bool, runtime: Runtime) -> tuple[str, str]:
    """Return the names of the hosts with a rank that `has` something, and of those with a rank that has not."""
    ranks = set(zip(hosts_of_ranks(runtime), (row[0] for row in all_gather_row([has], runtime)), strict=True))
    with_it, without = (", ".join(sorted(host for host, value in ranks if value == wanted)) for wanted in (1, 0))
    return with_it, without


def warn(line: str) -> None:
    """Print and log a warning about a value that can work but is probably a mistake."""
    log.warning("%s", line)
    print(f"distgpt: warning: {line}", file=sys.stderr, flush=True)


def plan_run(config: Config, runtime: Runtime, dataset: Dataset, session: RunSession) -> Plan:
    """Lay out the run over its ranks. A run that goes on keeps its data type and, if that divides, its micro-batch.

    Raises UsageError if the run directory is of another run, or if the run cannot be laid out over the ranks.
    """
    replicas = independent_replicas(config, runtime)
    if state := require_same_run(session.paths.checkpoints, config, dataset, replicas=replicas):
        config = with_choices_of(state, config, ranks=runtime.world_size)
        if config.parallel.reduction == "exact" and not config.train.micro_batch and state.micro_batch:
            batches = config.train.global_batch // state.micro_batch
            raise UsageError(
                f"exact reduction keeps the run's micro-batches of {state.micro_batch} sequences, {batches} a step, "
                f"which {ranks_text(runtime.world_size)} cannot share: take a number of ranks that divides {batches}, "
                "or set --train.micro_batch and get other bits from here on"
            )
    return make_plan(config, runtime, vocab_size=dataset.vocab_size)


@contextmanager
def explaining_out_of_memory(config: Config, plan: Plan, dataset: Dataset) -> Iterator[None]:
    """Raise UsageError with a micro-batch that fits in place of torch.OutOfMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of memory" not in str(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        smaller = smaller_micro_batch(config, plan, vocab_size=dataset.vocab_size)
        more = [] if config.parallel.activation_checkpoint else ["--parallel.activation_checkpoint"]
        more += [] if config.model.loss_chunk else ["--model.loss_chunk=1024"]
        more += [] if plan.sharded else ["parallel.strategy=fsdp on several GPUs"]
        fix = f"--train.micro_batch={smaller} should fit" if smaller else f"try {' or '.join(more)}"
        raise UsageError(f"out of memory with micro-batches of {plan.micro_batch} ({first_line}): {fix}") from error


def record_start(config: Config, plan: Plan, dataset: Dataset, session: RunSession, restored: RunState | None) -> None:
    """Warn of values that look like mistakes, and write the config of the run.

    With the micro-batch and the data type in use, on which its result depends. `restored`: of the checkpoint that it
    goes on from.
    """
    for line in warnings(config, dataset.train, restored):
        warn(line)
    session.require_owned()
    resolved = replace(config, train=replace(config.train, micro_batch=plan.micro_batch, dtype=plan.dtype_name))
    write_file(session.paths.config, to_toml(resolved).encode())


def open_progress(config: Config, plan: Plan, model: nn.Module, session: RunSession, *, start_step: int) -> Progress:
    """Open the progress of this rank. All ranks call it, since they add up the peaks of their devices."""
    gpt = unwrap_model(model)
    flops = gpt.flops_per_token()
    rate = peak_tokens_per_second(plan, flops_per_token=flops)
    peak = None if rate is None else rate * flops / plan.runtime.world_size
    grading = partial(grade, config, plan, vocab_size=gpt.vocab_size, peak=peak)
    return Progress(session, config, plan, start_step=start_step, peak_tokens_per_second=rate, grade=grading)


def training_batches(config: Config, plan: Plan, dataset: Dataset, *, start_step: int) -> Loader:
    """Open the training batches of this rank. Raises DataError if the text is shorter than a window."""
    return Loader(
        dataset.train,
        block_size=config.model.block_size,
        global_batch=config.train.global_batch,
        micro_batch=plan.micro_batch,
        rank=plan.runtime.rank,
        world_size=plan.runtime.world_size,
        seed=config.run.seed,
        device=plan.runtime.device,
        start_step=start_step,
    )


def validation_batches(
    config: Config, plan: Plan, dataset: Dataset, *, sequences: int, split: SplitName = "val"
) -> EvaluationBatches:
    """Open the evaluation batches of this rank. Raises DataError if the text is shorter than a window."""
    return EvaluationBatches(
        dataset.val if split == "val" else dataset.train,
        block_size=config.model.block_size,
        sequences=sequences,
        micro_batch=plan.micro_batch,
        rank=plan.runtime.rank,
        world_size=plan.runtime.world_size,
        device=plan.runtime.device,
    )


def open_data_of_run(recorded: str, given: str | None, *, fingerprint: str | None) -> Dataset:
    """Open and verify the data of a run, in its recorded directory or the `given` one. Raises DataError.

    `fingerprint`: of the data that the run was trained on; None accepts other data.
    """
    missing = [path for path, _ in shares_of(recorded) if not Path(path).is_dir()]
    if given is None and missing:
        raise DataError(f"the run's data is not in {missing[0]} any more: say where it is with --data=DIR")
    dataset = open_data(given or recorded)
    verify_dataset(dataset)
    if fingerprint is not None and dataset.fingerprint != fingerprint:
        raise DataError(f"{dataset} is not the data that the run was trained on: say where that is with --data=DIR")
    return dataset
