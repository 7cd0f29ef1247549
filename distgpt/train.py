"""Train a GPT: `torchrun --nproc_per_node=8 -m distgpt.train [PRESET] [--section.key=value ...]`.

Load the config -> check -> join the other ranks -> build -> resume -> loop (learn, report, evaluate, save) -> leave.

Step s of a run sees the same sequences and draws the same dropout masks for any number of ranks and after any restart:
both are functions of (seed, s, position in the global batch).
"""

from distgpt import cli

if __name__ == "__main__":
    cli.run("train")  # parses the command line, then imports this file as a module and calls main(); does not return

import os
import time
from contextlib import closing

from distgpt.checkpoint.checkpointer import Checkpointer
from distgpt.checkpoint.interval import SaveInterval
from distgpt.checkpoint.reader import TrainingState
from distgpt.config import Config, with_absolute_paths
from distgpt.corpus.mixture import open_data
from distgpt.corpus.shards import Dataset
from distgpt.corpus.tokenizer import load_tokenizer
from distgpt.distributed.collectives import weights_are_finite
from distgpt.distributed.diloco import OuterOptimizer
from distgpt.distributed.gradients import gradients_of
from distgpt.distributed.parallelize import build_model, reshard, unwrap_model
from distgpt.distributed.plan import Plan
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import this_rank
from distgpt.errors import DataError
from distgpt.health.outliers import Decision, OutlierFilter
from distgpt.health.stragglers import StragglerMonitor
from distgpt.health.watchdog import Watchdog
from distgpt.model.optim import build_optimizer, lr_at, set_lr
from distgpt.run.paths import RunPaths
from distgpt.run.session import RunSession
from distgpt.telemetry.profiling import profiled
from distgpt.training import startup, summary
from distgpt.training.cross_check import CrossCheck
from distgpt.training.evaluation import evaluate, sample_text
from distgpt.training.figures import FigureReader, Figures, not_finite
from distgpt.training.step import StopCheck, accumulate_gradients, apply_update
from distgpt.training.step_report import StepReporter, explain_outlier
from distgpt.weights import fit, initial


def main(config: Config) -> None:
    """Train one rank of a run. Whatever ends the run early also ends this process, see RunSession."""
    paths, rank, health = RunPaths(config.run_dir), int(os.environ.get("RANK", "0")), config.health
    with RunSession(paths, rank) as session, Watchdog(session, health) as watchdog:
        watchdog.heartbeat("checking the start", health.start_timeout)
        runtime, dataset = this_rank(config.train.device), open_data(config.data.path)
        config = with_absolute_paths(config)
        plan = startup.plan_run(config, runtime, dataset, session)
        startup.check_rank(config, plan, dataset, session, watchdog)
        fit.check_initial_weights(config, dataset, rank)
        with process_group(runtime, timeout=health.collective_timeout, on_store=watchdog.connect):
            startup.check_agreement(config, plan, dataset, session, watchdog)
            with startup.explaining_out_of_memory(config, plan, dataset):
                train(config, plan, dataset, session, watchdog)


def train(  # noqa: C901, PLR0915  the order of events, top to bottom
    config: Config, plan: Plan, dataset: Dataset, session: RunSession, watchdog: Watchdog
) -> None:
    """Build the model, resume, and train to the last step. Models are freed at the end, before the process group is."""
    health, runtime, last = config.health, plan.runtime, config.train.steps
    watchdog.heartbeat("building the model", health.start_timeout)
    model = build_model(config, plan, vocab_size=dataset.vocab_size, eot_id=dataset.eot_id)
    gradients = gradients_of(model, plan)
    optimizer = build_optimizer(model, config.optim, runtime.device.type, plan.dtype, exact=plan.exact)
    outer = OuterOptimizer(unwrap_model(model), config, plan) if plan.strategy == "diloco" else None
    outliers = OutlierFilter(health)
    checkpoints = Checkpointer(session, config, plan, dataset, TrainingState(model, optimizer, outliers, outer))
    validation = startup.validation_batches(config, plan, dataset, sequences=config.eval.sequences)
    tokenizer = load_tokenizer(dataset.path)

    session.say(summary.describe(config, plan, dataset, model))
    watchdog.heartbeat("restoring", health.start_timeout)
    start = session.step = checkpoints.restore()
    if checkpoints.restored is None and config.init.from_:
        session.say(initial.load_initial_weights(config, plan, dataset, model, outer))
    if start >= last:
        session.say(summary.nothing_to_do_message(config, start))
        return
    session.say(summary.start_message(config, checkpoints.restored))
    if runtime.rank == 0:
        startup.record_start(config, plan, dataset, session, checkpoints.restored)
    interval = SaveInterval(config.checkpoint.every, start_step=start, best_val_loss=checkpoints.best_val_loss())
    stragglers, cross_check = StragglerMonitor(model, runtime), CrossCheck(gradients, config, first_step=start + 1)

    def finish_save() -> None:
        """Let the save in progress commit before the run ends: its weights are good."""
        with watchdog.during("waiting for a save", health.checkpoint_timeout):
            checkpoints.wait()

    def require_finite_weights(step: int) -> None:
        """Raise DataError on all ranks if a weight is NaN or infinite, before it is saved or evaluated."""
        if not weights_are_finite(model, runtime):
            finish_save()
            raise DataError(f"weights are not finite after step {step}: nothing is saved; lower optim.lr")

    def save(step: int, *, val_loss: float | None = None, wait: bool) -> None:
        """Save the weights after `step`; `wait`: return when they are on disk, because the run ends there."""
        require_finite_weights(step)
        started = time.perf_counter()
        with progress.pausing("checkpoint"), watchdog.during(f"saving step {step}", health.checkpoint_timeout):
            checkpoints.save(step, val_loss=val_loss)
            if wait:
                checkpoints.require_saved(step)
        interval.record_save(step, stalled=time.perf_counter() - started)

    def after_each(done: int, count: int) -> None:
        """Show progress. If all ranks agree to stop, save the last finished step; a restart repeats this one."""
        progress.micro_batch(done, count)
        if done < count and stop_check.agreed():
            optimizer.zero_grad()
            reshard(model)
            reporter.report(decide(now=True))
            completed = session.step or 0
            if interval.last_save < completed:
                save(completed, wait=True)
            elif completed > start:
                finish_save()
                checkpoints.require_saved(completed)
            raise session.interrupted(last)

    def decide(*, now: bool) -> list[tuple[Figures, Decision]]:
        """Decide on the steps whose figures have been read. Raises DataError on all ranks if the run stops."""
        decided = [(f, outliers.check(loss=f.loss, grad_norm=f.grad_norm)) for f in reader.take(now=now)]
        for figures, decision in decided:
            if decision.action != "update":
                line = explain_outlier(decision, figures.step, config, batches)
                if decision.action == "stop":
                    finish_save()
                    raise DataError(line)
                session.say(line)
        return decided

    reader = FigureReader(runtime, at_once=health.skip_z > 0)  # a spike is found before the update
    stop_check = StopCheck(lambda: session.stop_requested is not None, runtime, on_wait=stragglers.timer.exclude)
    with (
        closing(startup.training_batches(config, plan, dataset, start_step=start)) as batches,
        startup.open_progress(config, plan, model, session, start_step=start) as progress,
        closing(
            profiled(range(start + 1, last + 1), config.profile, session, runtime.device, pausing=progress.pausing)
        ) as steps,
    ):
        reporter = StepReporter(plan, progress, stragglers, interval, checkpoints, start_step=start)
        session.allow_graceful_stop()
        watchdog.record_forward_passes(model, unwrap_model(model))
        watchdog.heartbeat("waiting for data", health.start_timeout)
        for step in steps:
            # learn
            stragglers.timer.begin()
            lr = set_lr(optimizer, lr_at(step - 1, config.optim, last))  # steps count from 1, the schedule from 0
            losses = accumulate_gradients(
                gradients, micro_batches := batches.next_step(), step, seed=config.run.seed, after_each=after_each
            )
            cross_check.compare(step, micro_batches[-1])
            norm, figures = gradients.finish(losses, stop=session.stop_requested is not None)
            reader.add(step, figures, lr=lr)
            decided = decide(now=False)  # on a GPU, on the step before
            checkpoints.wait_until_staged()
            if (step, "skip") not in [(of.step, decision.action) for of, decision in decided]:
                apply_update(optimizer, norm, clip=config.optim.grad_clip, skip=not_finite(figures))
            optimizer.zero_grad()
            evaluates = step == last or (config.eval.every > 0 and step % config.eval.every == 0)
            if evaluates or progress.is_logged(step) or interval.is_due(step):
                decided += decide(now=True)
            stop = any(of.stop for of, _ in decided)
            if outer is not None and step % config.parallel.outer_every == 0:
                outer.step()

            # report
            session.step = step
            watchdog.heartbeat(f"after step {step}", health.timeout)
            checkpoints.poll()
            reporter.step_done(step, data_wait=batches.pop_data_wait())
            reporter.report(decided)

            # evaluate
            val_loss = None
            if evaluates:
                require_finite_weights(step)
                with progress.pausing("evaluation"), watchdog.during(f"evaluating step {step}", health.eval_timeout):
                    result = evaluate(model, validation, tokenizer, plan)
                    val_loss = result.val_loss
                    progress.evaluation(step, result, best=interval.record_evaluation(step, val_loss))
                    if config.eval.sample_tokens:
                        progress.sample(step, sample_text(model, tokenizer, step, config, plan))

            # save
            if interval.is_due(step) or step == last or stop:
                save(step, val_loss=val_loss, wait=stop or step == last)
            if stop and step < last:
                raise session.interrupted(last)
    session.say(summary.done_message(session.paths, last))
