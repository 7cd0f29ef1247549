"""Steps of a run that are taken again as distgpt.train took them, on any number of ranks: for replay and verify."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from distgpt.checkpoint.choice import newest_good
from distgpt.checkpoint.compatibility import as_trained, with_choices_of
from distgpt.checkpoint.manifest import RunState, committed, describe_damage, read_state, step_of
from distgpt.checkpoint.reader import TrainingState, require_model
from distgpt.config import Config, from_dict, resolve, to_dict
from distgpt.corpus.shards import Dataset
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import build_model, unwrap_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError, UsageError
from distgpt.health.outliers import OutlierFilter
from distgpt.model.optim import build_optimizer, lr_at, set_lr
from distgpt.run.paths import RunPaths
from distgpt.training.figures import FigureReader, Figures, not_finite
from distgpt.training.startup import open_data_of_run, training_batches
from distgpt.training.step import accumulate_gradients, apply_update
from distgpt.units import ranks_text
from distgpt.weights.initial import load_initial_weights

# A rank may wait this long for the slowest one: rank 0 alone reads some files.
TIMEOUT_SECONDS = 86400.0


@dataclass(frozen=True)
class Start:
    """The start of steps that are taken again: a checkpoint and its state, both None for the initial weights."""

    config: Config  # of the attempt that took these steps
    replicas: int  # Plan.independent_replicas of it; 0: not recorded
    checkpoint: Path | None = None
    state: RunState | None = None

    @property
    def step(self) -> int:
        """The number of steps taken before the start."""
        return self.state.step if self.state else 0

    def to_json(self) -> dict[str, Any]:
        """Return what from_json() needs on another rank."""
        checkpoint = str(self.checkpoint) if self.checkpoint else None
        return {"config": to_dict(self.config), "replicas": self.replicas, "checkpoint": checkpoint}

    @staticmethod
    def from_json(config: dict[str, Any], replicas: int, checkpoint: str | None) -> "Start":
        """Return the start that rank 0 found. Raises DataError or StorageError."""
        path = Path(checkpoint) if checkpoint else None
        return Start(from_dict(config, source="rank 0"), replicas, path, read_state(path) if path else None)


def start_before(run: RunPaths, step: int) -> Start:
    """Start from the newest good checkpoint before `step`, or else from the initial weights. Raises DataError."""
    earlier = (checkpoint for checkpoint in committed(run.checkpoints) if step_of(checkpoint) < step)
    checkpoint, damaged = newest_good(earlier)
    if damaged:
        print(f"skipped {describe_damage(damaged)}")
    state = read_state(checkpoint) if checkpoint is not None else None
    return Start(*attempt_of(run, step, state), checkpoint, state)


def start_from(checkpoint: Path, run: RunPaths, step: int) -> Start:
    """Start from a checkpoint that the user chose. Raises UsageError if it is not from before `step`."""
    state = read_state(checkpoint)
    if state.step >= step:
        raise UsageError(f"{checkpoint} is of step {state.step}: to replay step {step}, choose one before it")
    return Start(*attempt_of(run, step, state), checkpoint, state)


def attempt_of(run: RunPaths, step: int, start_state: RunState | None) -> tuple[Config, int]:
    """Find the config and replicas of the attempt that took this step: of the next checkpoint, or the last attempt's.

    `start_state`: the state of the checkpoint to start from. Raises DataError if there is no run.
    """
    for checkpoint in reversed(committed(run.checkpoints)):
        if step_of(checkpoint) >= step:
            with suppress(DataError):
                state = read_state(checkpoint)
                return as_trained(state), state.replicas
    replicas = start_state.replicas if start_state and start_state.replicas > 1 else 0
    if run.config.is_file():
        try:
            config = resolve([str(run.config)], {})
            return (with_choices_of(start_state, config) if start_state else config), replicas
        except UsageError as error:
            if start_state is None:
                raise
            print(f"skipped {error}")
    if start_state is None:
        raise DataError(f"{run.root} holds no run: neither a checkpoint before step {step} nor {run.config.name}")
    return as_trained(start_state), replicas


def open_data(start: Start, directory: str | None) -> Dataset:
    """Open the data of the run, from `directory` if given. Raises DataError if the data are not those of the run."""
    fingerprint = start.state.data_fingerprint if start.state else None
    return open_data_of_run(start.config.data.path, directory, fingerprint=fingerprint)


def config_here(start: Start, runtime: Runtime) -> Config:
    """Return the config of a start with groups that this number of ranks can form.

    Raises UsageError if the replicas of diloco cannot be shared out among the ranks.
    """
    parallel, ranks, replicas = start.config.parallel, runtime.world_size, start.replicas
    if parallel.strategy == "diloco" and replicas:
        if ranks % replicas:
            raise UsageError(
                f"the run has {replicas} replicas that train independently (diloco), and there is {ranks_text(ranks)}: "
                f"start this under torchrun with --nproc_per_node={replicas}, or a multiple of that"
            )
        parallel = replace(parallel, shard=ranks // replicas)
    elif parallel.strategy == "hsdp" and parallel.shard and ranks % parallel.shard:
        parallel = replace(parallel, strategy="fsdp")
    return replace(start.config, parallel=parallel)


class Rerun:
    """A run as it was at a start, from which steps are taken again. All ranks call its methods. Call close()."""

    def __init__(self, start: Start, runtime: Runtime, dataset: Dataset) -> None:
        """Raise UsageError if these ranks cannot take the steps, DataError or StorageError."""
        config = self.config = config_here(start, runtime)
        plan = self.plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
        if start.checkpoint is not None:
            require_model(start.checkpoint, config, dataset.vocab_size)
        self.model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=dataset.eot_id)
        self.gradients = gradients_of(self.model, plan)
        optimizer = build_optimizer(self.model, config.optim, runtime.device.type, plan.dtype, exact=plan.exact)
        outer = OuterOptimizer(unwrap_model(self.model), config, plan) if plan.strategy == "diloco" else None
        self.state = TrainingState(self.model, optimizer, OutlierFilter(config.health), outer)
        if start.checkpoint is not None:
            self.state.load(start.checkpoint)
        elif config.init.from_:
            load_initial_weights(config, plan, dataset, self.model, outer)
        self.step = start.step
        self.batches = training_batches(config, plan, dataset, start_step=start.step)
        self._figures = FigureReader(runtime, at_once=True)

    def close(self) -> None:
        """End the thread that reads batches."""
        self.batches.close()

    def compute(self, step: int) -> tuple[Figures, Tensor, Tensor]:
        """Compute the gradients of the next step.

        Returns its figures, the gradient norm to clip by, and 1.0 if the step is not finite, else 0.0.
        """
        lr = set_lr(self.state.optimizer, lr_at(step - 1, self.config.optim, self.config.train.steps))
        losses = accumulate_gradients(self.gradients, self.batches.next_step(), step, seed=self.config.run.seed)
        norm, figures = self.gradients.finish(losses, stop=False)
        self._figures.add(step, figures, lr=lr)
        (read,) = self._figures.take(now=True)
        return read, norm, not_finite(figures)

    def take_steps(self, last: int) -> None:
        """Take the steps up to `last`. Raises DataError if one ends the run."""
        state, silent = self.state, True if self.plan.runtime.rank else None
        for step in tqdm(range(self.step + 1, last + 1), disable=silent, leave=False):
            figures, norm, skip = self.compute(step)
            decision = state.outliers.check(loss=figures.loss, grad_norm=figures.grad_norm)
            if decision.action == "stop":
                raise DataError(f"{decision.reason} at step {step} already: replay that step with --step={step}")
            if decision.action == "update":
                apply_update(state.optimizer, norm, clip=self.config.optim.grad_clip, skip=skip)
            state.optimizer.zero_grad()
            if state.outer is not None and step % self.config.parallel.outer_every == 0:
                state.outer.step()
        self.step = max(self.step, last)
