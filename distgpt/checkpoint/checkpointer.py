"""Save and restore the checkpoints of a run.

Its tensors are copied to memory while the next step computes its gradients; that step's update waits for the copy. A
checkpoint is written to a staging directory in the background, hashed, and committed by a rename. It is verified before
it is loaded.
Random state is not stored: the data order and dropout are pure functions of (seed, step), see `train.py`.
"""

import hashlib
import json
import logging
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from distgpt.checkpoint.chain import origin_of
from distgpt.checkpoint.choice import newest_good
from distgpt.checkpoint.manifest import (
    INDEX,
    MANIFEST,
    STATE,
    TOKENIZER,
    Link,
    RunState,
    checkpoint_path,
    committed,
    describe_damage,
    find_damage,
    one_line,
    read_state,
    sha256_of,
    step_of,
)
from distgpt.checkpoint.reader import TrainingState
from distgpt.checkpoint.staging import Stager
from distgpt.checkpoint.store import Store, best_checkpoint, prunable
from distgpt.checkpoint.writer import ShareWriter
from distgpt.config import Config, to_dict
from distgpt.corpus.loader import use_device
from distgpt.corpus.shards import Dataset
from distgpt.distributed.collectives import all_gather_json
from distgpt.distributed.plan import Plan
from distgpt.errors import DataError, StorageError
from distgpt.files import write_file
from distgpt.run.session import RunSession

T = TypeVar("T")

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores a run. All ranks call its methods together, in the same order."""

    def __init__(
        self, session: RunSession, config: Config, plan: Plan, dataset: Dataset, training: TrainingState
    ) -> None:
        """Raise DataError if the tokenizer of the data has been replaced."""
        self._session, self._config, self._plan, self._dataset = session, config, plan, dataset
        self._training = training
        self._directory = session.paths.checkpoints
        assert session.owner, "the run directory is owned before anything is written there"
        self._store = Store(self._directory, session.owner)
        self._tokenizer = _read_tokenizer(dataset)
        self._origin = origin_of(config, plan, dataset)
        timeout = timedelta(seconds=config.health.collective_timeout)
        # Saves run in the background: in a group of their own, their messages do not mix with those of training.
        # Any, since the type of a group differs between versions of torch.
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if plan.runtime.distributed else None
        self._stager = Stager(plan.runtime.device)
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=use_device, initargs=(plan.runtime.device,))
        self._staged: Future[dict[str, Any]] | None = None  # the copy of the last save
        self._pending: Future[tuple[int, ShareWriter]] | None = None
        self._write_stats = 0.0, 0.0
        self.restored: RunState | None = None  # the state in the checkpoint that restore() loaded
        self._saved: int | None = None  # the step of the last save, once it is known to be good

    def restore(self) -> int:
        """Load the newest good checkpoint into the model, optimizers and outlier filter. Returns its step, 0 if none.

        Damaged ones are moved aside, and a message says which and why. Raises DataError if all are damaged.
        """
        self._run_on_rank_zero(self._store.remove_leftovers)
        found = self._list_on_rank_zero(partial(committed, self._directory))
        checkpoint, damaged = newest_good(found, self._find_damage)
        if checkpoint is None:
            if damaged:
                why = describe_damage(damaged)
                raise DataError(f"{self._directory} holds no whole checkpoint ({why}); move it away to start over")
            return 0
        self.restored = self._training.load(checkpoint)
        manifest = self._run_on_rank_zero(partial(sha256_of, checkpoint / MANIFEST))
        self._store.newest = Link(self.restored.step, manifest)
        if damaged:
            self._run_on_rank_zero(self._store.create_staging_root)
            self._run_on_rank_zero(partial(self._store.set_aside, list(reversed(damaged))))
            self._session.say(f"going on from {checkpoint.name}; skipped {describe_damage(damaged)}")
        return self.restored.step

    def best_val_loss(self) -> float | None:
        """Return the lowest validation loss of all checkpoints, as rank 0 reads it."""

        def find() -> float | None:
            best = best_checkpoint(self._directory)
            return read_state(best).val_loss if best else None

        return self._run_on_rank_zero(find)

    def save(self, step: int, *, val_loss: float | None) -> None:
        """Copy the tensors and write them in the background, once the previous save is written.

        Call wait_until_staged() before they change. If a save fails, rank 0 prints a message and training goes on.
        """
        self.wait()
        self._stager.begin()
        self._staged = self._thread.submit(self._stager.copy, self._training.tensors())
        state = RunState(
            step=step,
            val_loss=val_loss,
            config=to_dict(self._config),
            data_fingerprint=self._dataset.fingerprint,
            tokenizer_sha256=self._dataset.meta["tokenizer"]["sha256"],
            vocab_size=self._dataset.vocab_size,
            eot_id=self._dataset.eot_id,
            micro_batch=self._plan.micro_batch,
            guard=self._training.outliers.state(),
            replicas=self._plan.independent_replicas,
            dtype=self._plan.dtype_name,
        )
        self._pending = self._thread.submit(self._write_and_commit, self._staged, state)
        self._saved = None
        if not self._config.checkpoint.async_save:
            self.wait()

    def wait_until_staged(self) -> None:
        """Wait until the tensors of the last save are copied, so that they may change."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def wait(self) -> None:
        """Wait until the save under way, if any, has committed or failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            self._saved, writer = pending.result()
            self._write_stats = self._write_stats[0] + writer.seconds, self._write_stats[1] + writer.bytes
        except StorageError as error:
            self._session.say(f"CHECKPOINT NOT SAVED, training goes on: {error}")

    @property
    def writing(self) -> bool:
        """Tell whether a save was under way at the last poll() or wait()."""
        return self._pending is not None

    def poll(self) -> None:
        """Take the result of a save in the background if it is done, and report it if it failed."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def pop_write_stats(self) -> tuple[float, float]:
        """Return the seconds and bytes that this rank wrote in saves that ended since the last call; reset them."""
        stats, self._write_stats = self._write_stats, (0.0, 0.0)
        return stats

    def require_saved(self, step: int) -> None:
        """Wait for the last save. Raises StorageError if it failed or is not of `step`."""
        self.wait()
        if self._saved != step:
            newest = next((c.name for c in committed(self._directory) if step_of(c) != step), "none")
            raise StorageError(
                f"step {step} could not be saved in {self._directory}: the newest checkpoint is {newest}"
            )

    def _write_and_commit(self, copy: Future[dict[str, Any]], state: RunState) -> tuple[int, ShareWriter]:
        """Write the share of this rank; rank 0 then commits. Runs in the background.

        Returns the step and the writer of the share. Raises StorageError on all ranks.
        """
        staged = copy.result()  # done: the thread has one task at a time
        writer = ShareWriter(staged, self._store.staging(state.step), self._plan.runtime.rank)
        try:
            other_replicas = self._plan.independent_replicas - 1
            size = _bytes_of(staged) + other_replicas * _bytes_of(staged.get("replica", {}))
            self._run_on_rank_zero(partial(self._store.create_staging, state.step, size))
            plans = self._run_on_all_ranks(writer.plan)
            written = self._run_on_all_ranks(partial(writer.write, plans))
            self._run_on_rank_zero(partial(self._commit, writer, written, state))
            self._prune(checkpoint_path(self._directory, state.step))
            return state.step, writer
        finally:
            if self._plan.runtime.rank == 0:
                self._store.remove_staging()

    def _commit(self, writer: ShareWriter, written: list[dict[str, Any]], state: RunState) -> None:
        """Write the files that only rank 0 writes, then commit. `written`: the results of ShareWriter.write()."""
        staging = self._store.staging(state.step)
        writer.finish(written)
        write_file(staging / STATE, json.dumps(asdict(state), indent=1).encode())
        write_file(staging / TOKENIZER, self._tokenizer)
        files = {name: entry for share in written for name, entry in share["files"].items()}
        for name in (INDEX, STATE, TOKENIZER):
            files[name] = {"bytes": (staging / name).stat().st_size, "sha256": sha256_of(staging / name)}
        self._store.commit(state.step, files, self._origin)

    def _prune(self, saved: Path) -> None:
        """Remove checkpoints that need not be kept, once the one just saved has been read back and is good."""
        problems: list[str] = []
        try:
            keep = self._config.checkpoint.keep
            old = self._list_on_rank_zero(partial(prunable, self._directory, keep=keep))
            problems = self._find_damage(saved) if old else []
            if old and not problems:
                self._run_on_rank_zero(partial(self._store.remove, old))
        except StorageError as error:
            log.warning("no old checkpoint was removed: %s", error)
        if problems:
            raise StorageError(f"{saved} is damaged already ({problems[0]}); no older checkpoint was removed")

    def _find_damage(self, checkpoint: Path) -> list[str]:
        """List what is wrong with a checkpoint. All ranks call it, and each reads a share."""
        runtime = self._plan.runtime

        def damage_of_share() -> list[str]:
            if not checkpoint.is_dir():  # rank 0 listed it, so it exists
                host = socket.gethostname()
                raise StorageError(f"{host} does not see {checkpoint}: is the run directory on a shared disk?")
            return find_damage(checkpoint, runtime.rank, runtime.world_size)

        shares = self._run_on_all_ranks(damage_of_share)
        return [problem for share in shares for problem in share]

    def _list_on_rank_zero(self, find: Callable[[], list[Path]]) -> list[Path]:
        """List checkpoints as rank 0 finds them: on a network file system the list of another rank may be stale."""
        names = self._run_on_rank_zero(lambda: [checkpoint.name for checkpoint in find()])
        return [self._directory / name for name in names]

    def _run_on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on every rank. Raises StorageError on all if it failed."""
        first, *_ = self._run_on_all_ranks(action if self._plan.runtime.rank == 0 else lambda: None)
        return cast(T, first)

    def _run_on_all_ranks(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return the results of all ranks, sent as JSON, on every rank.

        Raises StorageError on all ranks if one failed. Ends the process if another job has taken the run directory.
        """
        failed, result = "", None
        try:
            self._session.require_owned()
            result = action()
        # Any error is sent to the other ranks, which wait for an answer.
        except (Exception, dcp.CheckpointException) as error:
            with suppress(OSError):
                self._session.require_owned()  # the cause may be a new owner, which has removed the staged files
            log.exception("a checkpoint was not saved, read or removed")
            cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
            failed = one_line(cause)
        answers: list[Any] = [(failed, result)]
        if self._plan.runtime.distributed:
            answers = all_gather_json((failed, result), self._group)
        for failed, _ in answers:
            if failed:
                raise StorageError(failed)
        return [result for _, result in answers]


def _read_tokenizer(dataset: Dataset) -> bytes:
    """Return tokenizer.json, which each checkpoint copies. Raises DataError if it has been replaced since prepare."""
    content = (dataset.path / TOKENIZER).read_bytes()
    if hashlib.sha256(content).hexdigest() != dataset.meta["tokenizer"]["sha256"]:
        raise DataError(f"{dataset.path / TOKENIZER} is not the one that the data was prepared with")
    return content


def _bytes_of(tensors: dict[str, Any]) -> int:
    """Return the bytes of a nested dict of tensors, all shards together."""
    return sum(_bytes_of(v) if isinstance(v, dict) else v.numel() * v.element_size() for v in tensors.values())
