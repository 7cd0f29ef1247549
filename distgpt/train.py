"""Train a GPT: `torchrun --nproc_per_node=8 -m distgpt.train [PRESET] [--section.key=value ...]`.

Config -> checks -> cluster -> data, model, optimizer -> resume -> loop -> leave.

Step s of a run always sees the same sequences and draws the same dropout masks: both are functions of (seed, s,
position in the global batch), whatever the number of ranks and however often the run was restarted.
"""

import sys

from distgpt.cli import enter, main_guard
from distgpt.config import Config, config_from_command_line, to_dict, to_toml, with_absolute_data
from distgpt.run.exit_report import exit_if_restart_cannot_help
from distgpt.run.paths import RunPaths
from distgpt.run.session import NFS_ATTRIBUTE_CACHE_SECONDS, Run
from distgpt.torchrun import die_with_agent, place_in_job

ABOUT = "Train a GPT on a prepared corpus, or go on with the run in its run directory."

if __name__ == "__main__":
    # Before torch, which takes seconds to import: no rank outlives its agent, --help and a mistyped key answer at once.
    enter()
    die_with_agent()
    CONFIG = main_guard(lambda: config_from_command_line(sys.argv[1:], prog="distgpt.train", about=ABOUT))
    main_guard(place_in_job)
    main_guard(lambda: exit_if_restart_cannot_help(RunPaths(CONFIG.run_dir)))

import logging
import math
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.compatibility import require_same_run
from distgpt.checkpoint.interval import SaveInterval
from distgpt.checkpoint.manifest import committed
from distgpt.checkpoint.retention import checkpoint_bytes, require_space
from distgpt.checkpoint.store import require_writable
from distgpt.corpus.loader import EvaluationBatches, Loader
from distgpt.corpus.shards import Dataset, open_dataset, verify_dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.distributed.collectives import (
    agreed,
    from_rank_zero,
    gathered,
    grad_norm_of,
    hosts_of_ranks,
    require_agreement,
    weights_are_finite,
)
from distgpt.distributed.device import compute_dtype
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.distributed.parallelize import build_model, unwrap_model
from distgpt.distributed.plan import choose_strategy, micro_batch_size, replicas_apart
from distgpt.distributed.process_group import joined
from distgpt.distributed.runtime import Runtime, restarted, this_rank
from distgpt.errors import DataError, DirectoryError, StorageError
from distgpt.files import write_file
from distgpt.health.outliers import Guard, Verdict
from distgpt.health.watchdog import JOINING, Watchdog
from distgpt.model.gpt import count_parameters
from distgpt.model.optim import build_optimizer, lr_at, set_lr
from distgpt.run.lock import Owner
from distgpt.telemetry.progress import Progress
from distgpt.training.evaluation import evaluate, sample_text
from distgpt.training.startup import SLOWEST_DISK, describe, outlook
from distgpt.training.step import StopCheck, accumulate_gradients, update

log = logging.getLogger("distgpt")


def main(config: Config) -> None:
    """Check, join the other ranks, train, leave. Whatever ends the run early ends this process."""
    health = config.health
    with Run(RunPaths(config.run_dir), int(os.environ.get("RANK", "0"))) as run, Watchdog(run, health) as watchdog:
        watchdog.beat("checking the start", health.start_timeout)
        runtime = this_rank()
        dataset = open_dataset(Path(config.data.path))
        config = with_absolute_data(config)
        micro_batch = micro_batch_size(config, runtime)
        require_same_run(run.paths.checkpoints, config, dataset, runtime)
        if runtime.rank == 0:
            run.own()
            if config.run.fresh and not restarted() and committed(run.paths.checkpoints):
                raise DirectoryError(f"{run.paths.root} holds checkpoints: --run.fresh wants an empty run directory")
            require_writable(run.paths.checkpoints)
            size = 2 * (dataset.train.tokens + dataset.val.tokens)
            watchdog.beat("verifying the data", health.start_timeout + size / SLOWEST_DISK)
            verify_dataset(dataset)
            warn_if_full(run, config, dataset, runtime)
            watchdog.beat(JOINING, health.start_timeout)
        else:
            watchdog.beat("waiting for rank 0 to check the data", math.inf)
        with joined(runtime, timeout=health.collective_timeout, met=watchdog.connect):
            watchdog.beat("agreeing with the other ranks", health.start_timeout + NFS_ATTRIBUTE_CACHE_SECONDS)
            asked = to_dict(config)
            del asked["run"]["fresh"]  # which a launcher that starts again takes back
            require_agreement({**asked, "data": dataset.fingerprint}, runtime)
            owner = Owner(**from_rank_zero(asdict(run.owner) if run.owner else {}, runtime))
            require_shared(run, owner, runtime)
            run.joined(owner)
            train(config, run, watchdog, runtime, dataset, micro_batch)


def require_shared(run: Run, owner: Owner | None, runtime: Runtime) -> None:
    """Raise DirectoryError on all ranks unless all of them see the run directory that rank 0 took as `owner`."""
    seen = gathered([run.sees(owner)], runtime)
    blind = {host for host, (sees,) in zip(hosts_of_ranks(runtime), seen, strict=True) if not sees}
    if blind:
        hosts = ", ".join(sorted(blind))
        raise DirectoryError(f"{hosts} does not see {run.paths.root}: is it on a shared disk?")


def train(config: Config, run: Run, watchdog: Watchdog, runtime: Runtime, dataset: Dataset, micro_batch: int) -> None:
    """From the newest checkpoint, or from the initial weights, to the last step."""

    def say(text: str) -> None:
        log.info(text)
        if runtime.rank == 0:
            tqdm.write(text)

    health = config.health
    watchdog.beat("building the model", health.start_timeout)
    dtype = compute_dtype(config.train.dtype, runtime.device)
    strategy, reason = choose_strategy(config, runtime, vocab_size=dataset.vocab_size)
    model = build_model(
        config,
        runtime,
        strategy=strategy,
        vocab_size=dataset.vocab_size,
        eot_id=dataset.eot_id,
        micro_batch=micro_batch,
        dtype=dtype,
    )
    optimizer = build_optimizer(model, config.optim, runtime.device.type)
    outer = OuterOptimizer(unwrap_model(model), config, runtime) if strategy == "diloco" else None
    guard = Guard(config.health)
    checkpointer = Checkpointer(
        run,
        config=config,
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        guard=guard,
        runtime=runtime,
        say=say,
        outer=outer,
    )
    validation = EvaluationBatches(
        dataset.val,
        block_size=config.model.block_size,
        sequences=config.eval.sequences,
        micro_batch=micro_batch,
        rank=runtime.rank,
        world_size=runtime.world_size,
        device=runtime.device,
    )
    tokenizer = load_tokenizer(dataset.path)

    say(f"{describe(config, dataset, model, runtime, dtype, micro_batch)}\nstrategy  {strategy}, {reason}")
    watchdog.beat("restoring", health.start_timeout)
    start, last = checkpointer.restore(), config.train.steps
    run.step = start
    if start >= last:
        again = "" if config.optim.schedule == "constant" else ", and its learning rate up again"
        say(f"nothing to do: {run.paths.root} is at step {start} of {last}, --train.steps=N goes further{again}")
        return
    changed, doubts = outlook(config, dataset, checkpointer.restored)
    say(f"going on from step {start} in {run.paths.root}{changed}" if start else f"starting in {run.paths.root}")
    if runtime.rank == 0:
        for doubt in doubts:
            warn(doubt)
        run.require_owned()
        # With the micro-batch in use, on which the dropout masks depend.
        used = replace(config, train=replace(config.train, micro_batch=micro_batch))
        write_file(run.paths.config, to_toml(used).encode())

    def finish_save() -> None:
        """What ends the run early says nothing against the weights of the save under way."""
        with watchdog.during("waiting for a save", health.checkpoint_timeout):
            checkpointer.wait()

    best = checkpointer.best_val_loss()
    saves = SaveInterval(config.checkpoint.every, start_step=start, best_val_loss=best)
    with (
        closing(
            Loader(
                dataset.train,
                block_size=config.model.block_size,
                global_batch=config.train.global_batch,
                micro_batch=micro_batch,
                rank=runtime.rank,
                world_size=runtime.world_size,
                seed=config.run.seed,
                device=runtime.device,
                start_step=start,
            )
        ) as loader,
        Progress(
            run.paths,
            config=config,
            runtime=runtime,
            model=model,
            dtype=dtype,
            start_step=start,
            saves=saves,
            require_owned=run.require_owned,
        ) as progress,
    ):

        def save(step: int, *, val_loss: float | None = None, and_wait: bool) -> None:
            """Save what was learned up to `step`, in the background unless the run ends there."""
            require_finite_weights(model, step, runtime, finish_save)
            with progress.checkpointing(step), watchdog.during(f"saving step {step}", health.checkpoint_timeout):
                checkpointer.save(step, val_loss=val_loss)
                if and_wait:
                    checkpointer.require_saved(step)

        def after_micro_batch(done: int, count: int) -> None:
            """Between the micro-batches of a long step, heed a signal and give the step up; it is taken again later."""
            progress.micro_batch(done, count)
            if done < count and stops.agreed():
                optimizer.zero_grad()
                completed = run.step or 0
                if saves.last < completed:
                    save(completed, and_wait=True)
                elif completed > start:
                    finish_save()
                    checkpointer.require_saved(completed)
                raise run.interrupted(last)

        stops = StopCheck(lambda: run.stop_requested is not None, runtime, waited=progress.waited)
        run.training()
        watchdog.follow(model, unwrap_model(model))
        watchdog.beat("waiting for data", health.start_timeout)
        for step in range(start + 1, last + 1):
            lr = set_lr(optimizer, lr_at(step - 1, config.optim, last))
            batch = loader.next_step()
            loss = accumulate_gradients(model, batch, step, config, runtime, dtype, after_micro_batch)
            norm = grad_norm_of(model)
            mean_loss, grad_norm, stop = agreed(loss, norm, run.stop_requested is not None, runtime)
            verdict = guard.judge(loss=mean_loss, grad_norm=grad_norm)
            if verdict.action == "update":
                update(model, optimizer, norm, clip=config.optim.grad_clip)
            else:
                say(without_update(verdict, step, config, loader, finish_save))
            optimizer.zero_grad()
            if outer is not None and step % config.parallel.outer_every == 0:
                outer.step()

            run.step = step
            watchdog.beat(f"after step {step}", health.timeout)
            wait = loader.pop_data_wait()
            checkpointer.poll()
            progress.step(
                step,
                loss=mean_loss,
                lr=lr,
                grad_norm=grad_norm,
                verdict=verdict,
                data_wait=wait,
                saving=checkpointer.writing,
                saved=checkpointer.take_saved(),
            )
            val_loss = None
            if is_due(step, config.eval.every, last):
                require_finite_weights(model, step, runtime, finish_save)
                with progress.evaluating(), watchdog.during(f"evaluating step {step}", health.eval_timeout):
                    found = evaluate(model, validation, tokenizer=tokenizer, runtime=runtime, dtype=dtype)
                    progress.evaluation(step, found, best=saves.evaluated(step, found.val_loss))
                    if config.eval.sample_tokens:
                        progress.sample(step, sample_text(model, tokenizer, step, config, runtime, dtype))
                val_loss = found.val_loss
            if saves.is_due(step) or step == last or stop:
                save(step, val_loss=val_loss, and_wait=stop or step == last)
            if stop and step < last:
                raise run.interrupted(last)
    say(f"done: step {last} in {run.paths.root}, loss curve in {run.paths.plot}")


def without_update(verdict: Verdict, step: int, config: Config, loader: Loader, finish_save: Callable[[], None]) -> str:
    """Log where the sequences of a step came from whose update is left out; the line that says so.

    Raises DataError where it ends the run.
    """
    completed = step - 1
    places = [(int(shard), int(offset)) for shard, offset in zip(*loader.places(completed), strict=True)]
    log.error("step %d, windows of this rank as (shard, token offset): %s", step, places)
    first = completed * config.train.global_batch
    samples = f"samples {first} to {first + config.train.global_batch - 1} (their places are in logs/)"
    if verdict.action == "skip":
        return f"{verdict.objection} at step {step}: update skipped; {samples}"
    finish_save()
    after = f", after {verdict.skips} skipped in a row" if verdict.skips else ""
    fix = "lower optim.lr or set optim.grad_clip" + (", or raise health.skip_z" if config.health.skip_z else "")
    raise DataError(f"{verdict.objection} at step {step}: stopped before the update{after}; {samples}; {fix}")


def require_finite_weights(model: nn.Module, step: int, runtime: Runtime, finish_save: Callable[[], None]) -> None:
    """Raise DataError on all ranks rather than keep or try weights that an update made NaN or infinite."""
    if not weights_are_finite(model, runtime):
        finish_save()
        raise DataError(f"weights are not finite after step {step}: nothing is saved; lower optim.lr")


def warn_if_full(run: Run, config: Config, dataset: Dataset, runtime: Runtime) -> None:
    """Say before anything starts that no checkpoint will fit on the disk as it is."""
    needed = checkpoint_bytes(count_parameters(config.model, dataset.vocab_size), replicas_apart(config, runtime))
    try:
        require_space(run.paths.root, needed)
    except StorageError as error:
        warn(str(error))


def warn(line: str) -> None:
    """Tell a person of what is hardly meant, but can work."""
    log.warning("%s", line)
    print(f"distgpt: warning: {line}", file=sys.stderr, flush=True)


def is_due(step: int, every: int, last: int) -> bool:
    """Every so many steps (0: never) and after the last one."""
    return step == last or (every > 0 and step % every == 0)


if __name__ == "__main__":
    main_guard(lambda: main(CONFIG))
