"""Replicas of diloco end with the same weights as a plain version of the algorithm in the paper."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from distgpt.config import Config, resolve
from distgpt.corpus.loader import Loader, MicroBatch
from distgpt.corpus.shards import open_dataset
from distgpt.distributed.collectives import grad_norm_of
from distgpt.distributed.gradients import Gradients
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.model.gpt import GPT
from distgpt.model.optim import build_optimizer
from distgpt.training.step import accumulate_gradients, apply_update
from tests import jobs
from tests.end_to_end.conftest import ARGUMENTS, tiny

TWO = (*jobs.TINY, *ARGUMENTS["diloco"])


def batches(config: Config, data: Path, *, replica: int) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of one of two replicas, step by step."""
    dataset = open_dataset(data)
    loader = Loader(
        dataset.train,
        block_size=config.model.block_size,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=replica,
        world_size=2,
        seed=config.run.seed,
        device=torch.device("cpu"),
        start_step=0,
    )
    with closing(loader):
        while True:
            yield loader.next_step()


def diloco(config: Config, data: Path, steps: int) -> nn.Module:
    """Run algorithm 1 of Douillard et al. 2023 with two workers. Returns the model after so many inner steps."""
    dataset, parallel = open_dataset(data), config.parallel
    shared, *workers = (GPT(config.model, dataset.vocab_size, dataset.eot_id) for _ in range(3))
    for model in (shared, *workers):
        model.init_weights(config.run.seed)
    outer = torch.optim.SGD(shared.parameters(), lr=parallel.outer_lr, momentum=parallel.outer_momentum, nesterov=True)
    inner = [build_optimizer(worker, config.optim, "cpu") for worker in workers]
    fed = [batches(config, data, replica=replica) for replica in range(2)]
    for step in range(1, steps + 1):
        for replica, (worker, optimizer) in enumerate(zip(workers, inner, strict=True)):
            runtime = Runtime(replica, replica, 2, 2, torch.device("cpu"))
            plan = make_plan(config, runtime, vocab_size=dataset.vocab_size)
            accumulate_gradients(Gradients(worker, plan), next(fed[replica]), step, seed=config.run.seed)
            apply_update(optimizer, grad_norm_of(worker), clip=config.optim.grad_clip)
            optimizer.zero_grad()
        if step % parallel.outer_every == 0:
            with torch.no_grad():
                for start, *ends in zip(*(model.parameters() for model in (shared, *workers)), strict=True):
                    start.grad = sum(start - end for end in ends) / len(ends)
                outer.step()
                for worker in workers:
                    worker.load_state_dict(shared.state_dict())
    return shared


@pytest.fixture(scope="module")
def two_replicas(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of 18 steps of two replicas with one rank each."""
    run = tmp_path_factory.mktemp("two") / "run"
    ended = jobs.torchrun(2, *TWO, f"--data.path={prepared}", f"--run.dir={run}", "--train.steps=18")
    assert ended.code == 0, ended
    assert "strategy  diloco, as asked, 2 replicas of 1 shards that synchronize every 6 steps" in ended.stdout
    return run


def test_two_replicas_learn_what_the_algorithm_says(two_replicas: Path, prepared: Path) -> None:
    config = resolve([*TWO, f"--data.path={prepared}"], {})
    found = jobs.tensors(two_replicas / "checkpoints" / "step-00000018")
    start = GPT(config.model, open_dataset(prepared).vocab_size, None)
    start.init_weights(config.run.seed)
    first = start.state_dict()
    for name, expected in diloco(config, prepared, 18).state_dict().items():
        assert torch.allclose(found[f"model.{name}"], expected, atol=2e-5), name
        assert torch.equal(found[f"replica.0.model.{name}"], found[f"model.{name}"])
        assert torch.equal(found[f"replica.1.model.{name}"], found[f"model.{name}"])
        assert not torch.allclose(first[name], expected, atol=2e-4), name
    moments = [name.removeprefix("replica.0.") for name in found if name.startswith("replica.0.optim.state.")]
    assert any(not torch.equal(found[f"replica.0.{name}"], found[f"replica.1.{name}"]) for name in moments)


def test_shards_of_a_replica_change_nothing(prepared: Path, two_replicas: Path, tmp_path: Path) -> None:
    """Two replicas of two ranks each get the same batches as two of one rank each."""
    sharded = jobs.torchrun(
        4, *tiny(prepared, tmp_path), *ARGUMENTS["diloco"], "--parallel.shard=2", "--train.steps=18"
    )
    assert sharded.code == 0, sharded
    assert jobs.losses(tmp_path) == pytest.approx(jobs.losses(two_replicas), abs=1e-4)


def test_replicas_start_from_a_model_that_was_trained_without_them(prepared: Path, tmp_path: Path) -> None:
    """The paper pretrains so. The number of replicas cannot change later, since each has moments of its own."""
    before = jobs.train(1, *tiny(prepared, tmp_path), "--train.steps=12")
    assert before.code == 0, before
    apart = jobs.torchrun(2, *tiny(prepared, tmp_path), *ARGUMENTS["diloco"], "--train.steps=24")
    assert apart.code == 0, apart
    assert f"going on from step 12 in {tmp_path}" in apart.stdout
    assert jobs.val_losses(tmp_path)[24] < jobs.val_losses(tmp_path)[12]

    kept = jobs.checkpoints(tmp_path)
    for ranks, arguments in ((1, ()), (2, ARGUMENTS["ddp"])):
        refused = jobs.train(ranks, *tiny(prepared, tmp_path), *arguments)
        assert jobs.exit_report(tmp_path)["code"] == 2
        (line,) = refused.error_lines
        assert "was made by another run: replicas of diloco 2 -> 1; resume with the same values" in line
    assert jobs.checkpoints(tmp_path) == kept


def test_evaluate_uses_the_shared_model(two_replicas: Path) -> None:
    evaluated = jobs.command("evaluate", two_replicas, "--sequences", "30")
    assert evaluated.code == 0, evaluated
    assert f"step 18 | val loss {jobs.val_losses(two_replicas)[18]:.4f} " in evaluated.stdout


def test_a_step_is_replayed_by_any_multiple_of_the_replicas(two_replicas: Path) -> None:
    refused = jobs.command("replay", two_replicas, "--step", "3")
    assert refused.code == 2
    assert refused.error_lines == [
        "distgpt: error: the run has 2 replicas that train independently (diloco), and there is 1 rank: "
        "start this under torchrun with --nproc_per_node=2, or a multiple of that"
    ]
    ended = jobs.run(jobs.torchrun_command(4, str(two_replicas), "--step=15", module="distgpt.replay"))
    assert ended.code == 0, ended
    origin, weights, step, *figures = ended.stdout.splitlines()
    assert origin == "from      step-00000012, float32 on cpu"
    assert (weights, step) == ("weights   all finite", "step 15   all finite, forward and backward")
    replayed, logged = ([float(part.split()[-1]) for part in line.split(" | ")] for line in figures)
    assert replayed == pytest.approx(logged, abs=1e-5)


def test_replicas_replayed_in_the_same_layout_have_the_same_bits(two_replicas: Path) -> None:
    arguments = (str(two_replicas), "--replay=6", "--checkpoint=6")
    ended = jobs.run(jobs.torchrun_command(2, *arguments, module="distgpt.verify"))
    assert ended.code == 0, ended
    assert "replayed: steps 7 to 12 on 2 ranks give the same bits" in ended.stdout
