"""Checkpoints: staged, written in the background, hashed, committed by rename, verified before they are believed.

    checkpoints/step-00001000/     whole, or it would not have this name
        __0_0.distcp ...           tensors, sharded (torch.distributed.checkpoint), one file a rank
        .metadata                  DCP's index of them (a pickle, read through an allow-list)
        train.json                 step, validation loss, config, data fingerprint: see RunState
        tokenizer.json             so that sampling needs nothing else
        manifest.json              size and SHA-256 of each file above, and of itself

Random state is not stored: the data order and dropout are pure functions of (seed, step), see `train.py`.
"""

import hashlib
import json
import logging
import pickle
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from distgpt.cluster.runtime import Runtime
from distgpt.config import Config, from_dict, to_dict
from distgpt.corpus.shards import Dataset, sync, write_file
from distgpt.corpus.tokenizer import Tokenizer, load_tokenizer
from distgpt.errors import DataError, StorageError, UsageError
from distgpt.model.gpt import GPT

FORMAT_VERSION = 1
CHECKPOINT_BYTES = 12  # a parameter: a float32 weight and AdamW's two moments
MANIFEST, STATE, TOKENIZER = "manifest.json", "train.json", "tokenizer.json"
STAGING_PREFIX, BROKEN_PREFIX = ".staging-", "broken-"
# Keys outside of model.* that are part of what a run learns.
FIXED_KEYS = ("run.seed", "train.global_batch")
# Keys of model.* that only say how it is computed.
FREE_KEYS = ("model.loss_chunk",)

T = TypeVar("T")

log = logging.getLogger(__name__)
# One process saving on its own is what we ask for.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class RunState:
    """What a checkpoint knows besides its tensors."""

    step: int
    val_loss: float | None
    config: dict[str, Any]
    data_fingerprint: str
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int | None


class _Failure(str):
    """One line from a rank whose part went wrong, as it travels to the others."""


class Checkpointer:
    """Saves and restores one run. All ranks call its methods together, in the same order."""

    def __init__(
        self,
        directory: Path,
        *,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
        say: Callable[[str], None],
    ) -> None:
        """`say` shows a person one line."""
        self._directory = directory
        self._config = config
        self._dataset = dataset
        self._model = model
        self._optimizer = optimizer
        self._runtime = runtime
        self._say = say
        # A group of its own: a save in the background must not mix its messages with training's.
        timeout = timedelta(seconds=config.health.timeout)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if runtime.distributed else None
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def restore(self) -> int:
        """Load the newest good checkpoint into the model and optimizer; its step, 0 where there is none at all.

        Says in one line what it skipped and why, and moves that aside. Raises DataError if every one is broken.
        """
        broken: dict[str, str] = {}
        # Rank 0's list: on a network file system another rank's may be stale, and each would take another checkpoint.
        for name in self._together(lambda: [checkpoint.name for checkpoint in committed(self._directory)])[0]:
            checkpoint = self._directory / name
            self._together(partial(_require_visible, checkpoint))
            shares = self._together(partial(damage, checkpoint, self._runtime.rank, self._runtime.world_size))
            problems = [problem for share in shares for problem in share]
            if not problems:
                break
            broken[checkpoint.name] = problems[0]
        else:
            if broken:
                raise DataError(f"{self._directory} {_all_broken(broken)}; move it away to start over")
            return 0
        self._load(checkpoint)
        if broken:
            self._together(partial(self._set_aside, list(broken)))
            self._say(f"going on from {checkpoint.name}; skipped {_listed(broken)}")
        return read_state(checkpoint).step

    def best_val_loss(self) -> float | None:
        """The lowest validation loss of any checkpoint kept."""
        best = best_of(self._directory)
        return read_state(best).val_loss if best else None

    def save(self, step: int, *, val_loss: float | None) -> None:
        """Stage a copy now and write it in the background; wait first for a save that is still being written.

        A save that fails is told loudly and training goes on.
        """
        self.wait()
        staged = self._stager.stage(self._tensors())
        assert isinstance(staged, dict), "staging is synchronous"
        state = RunState(
            step=step,
            val_loss=val_loss,
            config=to_dict(self._config),
            data_fingerprint=self._dataset.fingerprint,
            tokenizer_sha256=self._dataset.meta["tokenizer"]["sha256"],
            vocab_size=self._dataset.vocab_size,
            eot_id=self._dataset.eot_id,
        )
        self._pending = self._thread.submit(self._write_and_commit, staged, state)
        if not self._config.checkpoint.async_save:
            self.wait()

    def wait(self) -> bool:
        """Wait for the save under way, if any. Returns whether it succeeded."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except StorageError as error:
            self._say(f"CHECKPOINT NOT SAVED, training goes on: {error}")
            return False
        return True

    def poll(self) -> None:
        """Tell of a save in the background that failed, once it has."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def require_saved(self, step: int) -> None:
        """Wait for the save under way, the last one. Raises StorageError if `step` is not on the disk after it."""
        self.wait()
        if not _path(self._directory, step).is_dir():
            newest = next((c.name for c in committed(self._directory)), "none")
            raise StorageError(
                f"step {step} could not be saved in {self._directory}: the newest checkpoint is {newest}"
            )

    def _tensors(self) -> dict[str, Any]:
        """Model and optimizer state by name. Hyper-parameters stay out: the config and the step give them."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optim = get_optimizer_state_dict(self._model, self._optimizer, options=options)
        return {
            "model": get_model_state_dict(self._model),
            "optim": {name: value for name, value in optim.items() if name.startswith("state.")},
        }

    def _load(self, checkpoint: Path) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optim = get_optimizer_state_dict(self._model, self._optimizer, options=options)
        tensors = self._tensors()
        _read_tensors(tensors, checkpoint, self._group)
        set_model_state_dict(self._model, tensors["model"])
        set_optimizer_state_dict(self._model, self._optimizer, {**optim, **tensors["optim"]}, options=options)

    def _write_and_commit(self, staged: dict[str, Any], state: RunState) -> None:
        """On every rank, in the background: write, hash, fsync; rank 0 then commits. Raises StorageError on all."""
        final = _path(self._directory, state.step)
        staging = self._directory / f"{STAGING_PREFIX}{final.name}"
        try:
            self._together(partial(self._open_staging, staging, _bytes_of(staged)))
            self._together(partial(self._write_tensors, staged, staging))
            shares = self._together(partial(self._finish_files, staging, state))
            files = {name: entry for share in shares for name, entry in share.items()}
            self._together(partial(self._commit, staging, final, files))
        except StorageError:
            if self._runtime.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        if self._runtime.rank == 0:
            prune(self._directory, keep=self._config.checkpoint.keep)

    def _open_staging(self, staging: Path, needed: int) -> None:
        if self._runtime.rank:
            return
        staging.parent.mkdir(parents=True, exist_ok=True)
        for left_over in staging.parent.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(left_over)
        require_space(staging.parent, needed)
        staging.mkdir()

    def _write_tensors(self, staged: dict[str, Any], staging: Path) -> None:
        writer = dcp.FileSystemWriter(staging, single_file_per_rank=True, sync_files=True)
        dcp.save(staged, storage_writer=writer, process_group=self._group, no_dist=self._group is None)

    def _finish_files(self, staging: Path, state: RunState) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of the files that this rank wrote."""
        rank = self._runtime.rank
        files = sorted(staging.glob(f"__{rank}_*"))
        if rank == 0:
            write_file(staging / STATE, json.dumps(asdict(state), indent=1).encode())
            write_file(staging / TOKENIZER, (self._dataset.path / TOKENIZER).read_bytes())
            files += [staging / name for name in (".metadata", STATE, TOKENIZER)]
        return {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}

    def _commit(self, staging: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
        if self._runtime.rank:
            return
        write_file(staging / MANIFEST, _manifest_bytes(files))
        staging.rename(final)
        sync(final.parent)

    def _set_aside(self, names: Sequence[str]) -> None:
        if self._runtime.rank == 0:
            for name in names:
                (self._directory / name).rename(self._directory / f"{BROKEN_PREFIX}{name}-{time.time_ns()}")

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and give every rank all results. Raises StorageError on all if any failed."""
        mine: T | _Failure
        try:
            mine = action()
        except (Exception, dcp.CheckpointException) as error:  # whatever it is, the other ranks wait to hear of it
            log.exception("checkpoint")
            mine = _Failure(_one_line(error))
        results: list[Any] = [mine]
        if self._runtime.distributed:
            results = [None] * self._runtime.world_size
            dist.all_gather_object(results, mine, group=self._group)
        for result in results:
            if isinstance(result, _Failure):
                raise StorageError(str(result))
        return results


def _require_visible(checkpoint: Path) -> None:
    """Raise StorageError if this rank does not see what rank 0 sees; that says nothing against the checkpoint."""
    if not checkpoint.is_dir():
        raise StorageError(f"{socket.gethostname()} does not see {checkpoint}: is the run directory on a shared disk?")


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def committed(directory: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((d for d in directory.glob("step-*") if d.is_dir()), reverse=True)


def damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with a checkpoint, as far as this rank's share of its files shows; empty if nothing is."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        files = manifest["files"]
        if _manifest_bytes(files) != (checkpoint / MANIFEST).read_bytes():
            return [f"{MANIFEST} is damaged"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({_one_line(error)})"]
    problems = []
    for name in sorted(files)[rank::world_size]:
        try:
            size = (checkpoint / name).stat().st_size
            if size != files[name]["bytes"]:
                problems.append(f"{name} has {size} bytes, not {files[name]['bytes']}")
            elif _sha256(checkpoint / name) != files[name]["sha256"]:
                problems.append(f"{name} does not match its hash")
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
    return problems


def read_state(checkpoint: Path) -> RunState:
    """train.json of a checkpoint. Raises DataError if it is not one."""
    try:
        return RunState(**json.loads((checkpoint / STATE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{checkpoint / STATE} cannot be read: {_one_line(error)}") from None


def require_same_run(directory: Path, config: Config, dataset: Dataset) -> None:
    """Raise UsageError with a diff if the newest checkpoint is of another model, data, seed or global batch."""
    for checkpoint in committed(directory):
        try:
            state = read_state(checkpoint)
        except DataError:
            continue  # restore() says what is wrong with it
        differences = _differences(state, config, dataset)
        if differences:
            raise UsageError(
                f"{checkpoint} was made by another run: {'; '.join(differences)}; "
                "resume with the same values or choose another --run.dir"
            )
        return


def load_for_inference(run: Path, device: torch.device) -> tuple[GPT, Tokenizer, RunState]:
    """The model of a run directory's newest good checkpoint, in eval mode, with its tokenizer. One process.

    Raises DataError if there is no good checkpoint.
    """
    candidates = committed(run / "checkpoints")
    if not candidates:
        raise DataError(f"{run} holds no checkpoint: train one with python -m distgpt.train --run.dir={run}")
    broken: dict[str, str] = {}
    for checkpoint in candidates:
        problems = damage(checkpoint)
        if problems:
            broken[checkpoint.name] = problems[0]
            continue
        state = read_state(checkpoint)
        config = from_dict(state.config, source=str(checkpoint / STATE))
        model = GPT(config.model, state.vocab_size, state.eot_id)
        _read_tensors({"model": model.state_dict()}, checkpoint, None)
        return model.to(device).eval(), load_tokenizer(checkpoint / TOKENIZER), state
    raise DataError(f"{run} {_all_broken(broken)}")


def require_space(directory: Path, needed: int) -> None:
    """Raise StorageError unless the disk has room for `needed` bytes and a little more."""
    free = shutil.disk_usage(directory).free
    if free < needed * 1.02 + 2**20:
        raise StorageError(
            f"{directory} has {free / 2**20:.0f} MiB free and a checkpoint takes {needed / 2**20:.0f} MiB: "
            "free some space or lower checkpoint.keep"
        )


def prune(directory: Path, *, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` and the one with the lowest validation loss.

    A directory that holds a file that is not in its manifest is left alone.
    """
    best = best_of(directory)
    for checkpoint in committed(directory)[keep:]:
        try:
            ours = {MANIFEST, *json.loads((checkpoint / MANIFEST).read_bytes())["files"]}
            if checkpoint != best and {f.name for f in checkpoint.iterdir()} == ours:
                # Under another name first: a kill in between leaves no half of one under a whole one's name.
                shutil.rmtree(checkpoint.rename(directory / f"{STAGING_PREFIX}{checkpoint.name}"))
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s stays: %s", checkpoint, _one_line(error))


def best_of(directory: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, None if none was evaluated."""
    losses: dict[Path, float] = {}
    for checkpoint in committed(directory):
        try:
            loss = read_state(checkpoint).val_loss
        except DataError:
            continue
        if loss is not None:
            losses[checkpoint] = loss
    return min(losses, key=lambda checkpoint: losses[checkpoint]) if losses else None


class _MetadataUnpickler(pickle.Unpickler):
    """DCP's metadata is a pickle; this builds only the plain records that one needs and runs no foreign code."""

    ALLOWED = frozenset(
        {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                *("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
                *("MetadataIndex", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata"),
            )
        }
        | {
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
        }
        | {("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")}
    )

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # where Python 3.13 pickles it from
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, ValueError, TypeError) as error:
            raise DataError(f"{path} is not a checkpoint index of ours: {_one_line(error)}") from None
        if not isinstance(metadata, Metadata):
            raise DataError(f"{path} is not a checkpoint index of ours")
        return metadata


def _read_tensors(tensors: dict[str, Any], checkpoint: Path, group: dist.ProcessGroup | None) -> None:
    """Fill `tensors` in place, whatever their sharding now and then."""
    reader = _Reader(checkpoint)
    reader.read_metadata()  # here a DataError is one; dcp.load would wrap it in its own
    dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)


def _differences(state: RunState, config: Config, dataset: Dataset) -> list[str]:
    then, now = from_dict(state.config, source=STATE), config
    model_keys = (f"model.{name}" for name in to_dict(config)["model"])
    differences = []
    for key in (*model_keys, *FIXED_KEYS):
        section, name = key.split(".")
        old, new = (to_dict(c)[section][name] for c in (then, now))
        if old != new and key not in FREE_KEYS:
            differences.append(f"{key} {old} -> {new}")
    if state.vocab_size != dataset.vocab_size:
        differences.append(f"vocabulary {state.vocab_size} -> {dataset.vocab_size}")
    if state.data_fingerprint != dataset.fingerprint:
        differences.append(f"data {state.data_fingerprint[:12]} -> {dataset.fingerprint[:12]} ({dataset.path})")
    return differences


def _manifest_bytes(files: dict[str, dict[str, Any]]) -> bytes:
    """manifest.json: canonical, and with a hash of itself, so that a flipped bit in it shows too."""
    body = {"format_version": FORMAT_VERSION, "files": files}
    own_hash = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": own_hash}, sort_keys=True, indent=1).encode()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _bytes_of(tensors: dict[str, Any]) -> int:
    """Bytes of a nested dict of tensors, all shards together."""
    return sum(_bytes_of(v) if isinstance(v, dict) else v.numel() * v.element_size() for v in tensors.values())


def _listed(broken: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in broken.items())


def _all_broken(broken: dict[str, str]) -> str:
    return f"holds no whole checkpoint ({_listed(broken)})"


def _one_line(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), "") or type(error).__name__
