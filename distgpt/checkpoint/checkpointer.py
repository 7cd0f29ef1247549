"""Checkpoints: staged, written in the background, hashed, committed by rename, verified before they are believed.

What one is on disk: manifest.py. How tensors are read back: reader.py. Which ones stay: retention.py.
Random state is not stored: the data order and dropout are pure functions of (seed, step), see `train.py`.
"""

import hashlib
import json
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from distgpt.checkpoint.manifest import (
    INDEX,
    STATE,
    TOKENIZER,
    RunState,
    all_broken,
    committed,
    damage,
    listed,
    one_line,
    path_of,
    read_state,
    sha256_of,
    step_of,
)
from distgpt.checkpoint.reader import load_for_training, training_tensors
from distgpt.checkpoint.retention import best_of, surplus
from distgpt.checkpoint.store import Store
from distgpt.checkpoint.writer import Saving, _TimedWriter
from distgpt.config import Config, to_dict
from distgpt.corpus.shards import Dataset
from distgpt.distributed.collectives import all_gather
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.distributed.plan import micro_batch_size, replicas_apart
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, StorageError
from distgpt.files import write_file
from distgpt.health.outliers import Guard
from distgpt.run.session import Run

T = TypeVar("T")

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores one run. All ranks call its methods together, in the same order."""

    def __init__(
        self,
        run: Run,
        *,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        runtime: Runtime,
        say: Callable[[str], None],
        outer: OuterOptimizer | None = None,
    ) -> None:
        """`say` shows a person one line. `outer`: that of diloco."""
        self._run = run
        self._directory = run.paths.checkpoints
        assert run.owner, "the run directory is owned before anything is written there"
        self._store = Store(self._directory, run.owner)
        self._config = config
        self._dataset = dataset
        self._model = model
        self._optimizer, self._outer = optimizer, outer
        self._replicas = replicas_apart(config, runtime)
        self._guard = guard
        self._runtime = runtime
        self._say = say
        self._tokenizer = _tokenizer_of(dataset)
        # A group of its own: a save in the background must not mix its messages with training's.
        timeout = timedelta(seconds=config.health.collective_timeout)
        # Of a type that differs between versions of torch.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if runtime.distributed else None
        # Not DefaultStager, which in torch 2.11 can stage once only.
        self._stager = StateDictStager()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[tuple[int, _TimedWriter]] | None = None
        self._written = 0.0, 0.0
        self.restored: RunState | None = None  # what the checkpoint that restore() loaded knows
        self._saved: int | None = None  # the step of the last save, once it is known to be good

    def restore(self) -> int:
        """Load the newest good checkpoint into the model, optimizer and guard; its step, 0 where there is none at all.

        Says in one line what it skipped and why, and moves that aside. Raises DataError if every one is broken.
        """
        self._on_rank_zero(self._store.remove_left_overs)
        broken: dict[str, str] = {}
        # Rank 0's list: on a network file system another rank's may be stale, and each would take another checkpoint.
        for name in self._on_rank_zero(lambda: [checkpoint.name for checkpoint in committed(self._directory)]):
            checkpoint = self._directory / name
            self._together(partial(_require_visible, checkpoint))
            problems = self._damage(checkpoint)
            if not problems:
                break
            broken[checkpoint.name] = problems[0]
        else:
            if broken:
                raise DataError(f"{self._directory} {all_broken(broken)}; move it away to start over")
            return 0
        load_for_training(checkpoint, self._model, self._optimizer, self._outer)
        if broken:
            self._on_rank_zero(self._store.begin)
            self._on_rank_zero(partial(self._store.set_aside, list(reversed(broken))))
            self._say(f"going on from {checkpoint.name}; skipped {listed(broken)}")
        state = read_state(checkpoint)
        self._guard.restore(state.guard)
        self.restored = state
        return state.step

    def best_val_loss(self) -> float | None:
        """The lowest validation loss of any checkpoint kept, as rank 0 finds it."""

        def find() -> float | None:
            best = best_of(self._directory)
            return read_state(best).val_loss if best else None

        return self._on_rank_zero(find)

    def save(self, step: int, *, val_loss: float | None) -> None:
        """Stage a copy now and write it in the background; wait first for a save that is still being written.

        A save that fails is told loudly and training goes on.
        """
        self.wait()
        tensors = training_tensors(self._model, self._optimizer)
        staged = self._stager.stage(self._outer.in_checkpoint(tensors) if self._outer else tensors)
        state = RunState(
            step=step,
            val_loss=val_loss,
            config=to_dict(self._config),
            data_fingerprint=self._dataset.fingerprint,
            tokenizer_sha256=self._dataset.meta["tokenizer"]["sha256"],
            vocab_size=self._dataset.vocab_size,
            eot_id=self._dataset.eot_id,
            micro_batch=micro_batch_size(self._config, self._runtime),
            guard=self._guard.state(),
            replicas=self._replicas,
        )
        self._pending = self._thread.submit(self._write_and_commit, staged, state)
        self._saved = None
        if not self._config.checkpoint.async_save:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            self._saved, writer = pending.result()
            self._written = self._written[0] + writer.seconds, self._written[1] + writer.bytes
        except StorageError as error:
            self._say(f"CHECKPOINT NOT SAVED, training goes on: {error}")

    @property
    def writing(self) -> bool:
        """Whether a save is under way, as far as the last poll() or wait() found."""
        return self._pending is not None

    def poll(self) -> None:
        """Tell of a save in the background that failed, once it has."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def take_saved(self) -> tuple[float, float]:
        """Seconds and bytes of this rank's own writing in the saves that came to their end since the last call."""
        written, self._written = self._written, (0.0, 0.0)
        return written

    def require_saved(self, step: int) -> None:
        """Wait for the save under way, the last one. Raises StorageError if it is not of `step`, or failed."""
        self.wait()
        if self._saved != step:
            newest = next((c.name for c in committed(self._directory) if step_of(c) != step), "none")
            raise StorageError(
                f"step {step} could not be saved in {self._directory}: the newest checkpoint is {newest}"
            )

    def _write_and_commit(self, staged: dict[str, Any], state: RunState) -> tuple[int, "_TimedWriter"]:
        """On every rank, in the background: write, hash, fsync; rank 0 then commits. Raises StorageError on all.

        Returns the step, and what wrote this rank's share.
        """
        staging = self._store.staging(state.step)
        writer = _TimedWriter(staging, single_file_per_rank=True, sync_files=True)
        try:
            needed = _bytes_of(staged) + (self._replicas - 1) * _bytes_of(staged.get("replica", {}))
            self._on_rank_zero(partial(self._store.open, state.step, needed))
            saving = Saving(staged, writer, self._runtime.rank)
            plans = self._together(saving.plan)
            written = self._together(partial(saving.write, plans))
            self._on_rank_zero(partial(saving.finish, written))
            shares = self._together(partial(self._finish_files, staging, state))
            files = {name: entry for share in shares for name, entry in share.items()}
            self._on_rank_zero(partial(self._store.commit, state.step, files))
            self._prune(path_of(self._directory, state.step))
            return state.step, writer
        finally:
            if self._runtime.rank == 0:
                self._store.close()

    def _finish_files(self, staging: Path, state: RunState) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of the files that this rank wrote."""
        rank = self._runtime.rank
        files = sorted(staging.glob(f"__{rank}_*"))
        if rank == 0:
            write_file(staging / STATE, json.dumps(asdict(state), indent=1).encode())
            write_file(staging / TOKENIZER, self._tokenizer)
            files += [staging / name for name in (INDEX, STATE, TOKENIZER)]
        return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}

    def _prune(self, saved: Path) -> None:
        """Remove what need not be kept, if the checkpoint just saved, read once more, can stand for it."""
        problems: list[str] = []
        try:
            keep = self._config.checkpoint.keep
            names = self._on_rank_zero(lambda: [checkpoint.name for checkpoint in surplus(self._directory, keep=keep)])
            old = [self._directory / name for name in names]
            problems = self._damage(saved) if old else []
            if old and not problems:
                self._on_rank_zero(partial(self._store.remove, old))
        except StorageError as error:
            log.warning("old checkpoints stay: %s", error)
        if problems:
            raise StorageError(f"{saved} is damaged already ({problems[0]}); no older checkpoint was removed")

    def _damage(self, checkpoint: Path) -> list[str]:
        """What is wrong with a checkpoint; each rank reads a share of it."""
        shares = self._together(partial(damage, checkpoint, self._runtime.rank, self._runtime.world_size))
        return [problem for share in shares for problem in share]

    def _on_rank_zero(self, action: Callable[[], T]) -> T:
        """What `action` gives on rank 0, on every rank. Raises StorageError on all if it failed."""
        first, *_ = self._together(action if self._runtime.rank == 0 else _nothing)
        return cast(T, first)

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and give every rank all results, as JSON has them.

        Raises StorageError on all if any failed, or found that the directory is no longer ours.
        """
        failed, mine = "", None
        try:
            self._run.require_owned()
            mine = action()
        except (Exception, dcp.CheckpointException) as error:  # whatever it is, the other ranks wait to hear of it
            log.exception("checkpoint")
            cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
            failed = one_line(cause)
        told: list[Any] = [(failed, mine)]
        if self._runtime.distributed:
            told = all_gather((failed, mine), self._group)
        for failed, _ in told:
            if failed:
                raise StorageError(failed)
        return [result for _, result in told]


def _tokenizer_of(dataset: Dataset) -> bytes:
    """Its file, read before another dataset can stand in its place. Raises DataError if one does."""
    content = (dataset.path / TOKENIZER).read_bytes()
    if hashlib.sha256(content).hexdigest() != dataset.meta["tokenizer"]["sha256"]:
        raise DataError(f"{dataset.path / TOKENIZER} is not the one that the data was prepared with")
    return content


def _require_visible(checkpoint: Path) -> None:
    """Raise StorageError if this rank does not see what rank 0 sees; that says nothing against the checkpoint."""
    if not checkpoint.is_dir():
        raise StorageError(f"{socket.gethostname()} does not see {checkpoint}: is the run directory on a shared disk?")


def _nothing() -> None:
    """What the other ranks do meanwhile."""


def _bytes_of(tensors: dict[str, Any]) -> int:
    """Bytes of a nested dict of tensors, all shards together."""
    return sum(_bytes_of(v) if isinstance(v, dict) else v.numel() * v.element_size() for v in tensors.values())
