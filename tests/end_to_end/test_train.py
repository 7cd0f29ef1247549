"""Real jobs on tinyshakespeare: their loss falls, and does not depend on the topology."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distgpt.config import resolve
from distgpt.corpus.shards import open_dataset
from distgpt.telemetry.dashboard import THROUGHPUT, TRAIN_LOSS, VALIDATION_LOSS
from distgpt.units import ranks_text
from tests import jobs
from tests.end_to_end.conftest import ARGUMENTS, RANKS, Trained, tiny
from tests.once import made_once

# The shape of the seed preset, smaller, without dropout.
SEED_SHAPED = (
    *("seed", "--model.n_layer=2", "--model.n_embd=48", "--model.block_size=64", "--model.dropout=0"),
    *("--train.global_batch=16", "--train.steps=50", "--train.dtype=float32", "--optim.lr=1e-3", "--log.every=1"),
    *("--eval.every=25", "--eval.sequences=60", "--eval.sample_tokens=40", "--checkpoint.every=0"),
)
# Different micro-batches on purpose: they must not matter.
MICRO_BATCH = {"single": 16, "fsdp": 8}
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def seed_shaped(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run directories of 50 steps of one process, and of two with FSDP."""

    def train(root: Path) -> None:
        for strategy, micro_batch in MICRO_BATCH.items():
            arguments = [
                f"--data.path={prepared}",
                f"--run.dir={root / strategy}",
                f"--train.micro_batch={micro_batch}",
            ]
            ended = jobs.train(RANKS[strategy], *SEED_SHAPED, *arguments, *ARGUMENTS[strategy])
            assert ended.code == 0, ended

    root = made_once(tmp_path_factory, "seed-shaped", train)
    return {strategy: root / strategy for strategy in MICRO_BATCH}


def test_two_processes_give_the_losses_of_one(seed_shaped: dict[str, Path]) -> None:
    one, two = (jobs.losses(seed_shaped[name]) for name in ("single", "fsdp"))
    assert list(one) == list(range(1, 51))
    assert two == pytest.approx(one, abs=TOLERANCE)
    one, two = (jobs.val_losses(seed_shaped[name]) for name in ("single", "fsdp"))
    assert list(one) == [25, 50]
    assert two == pytest.approx(one, abs=TOLERANCE)


def test_the_loss_falls(seed_shaped: dict[str, Path], prepared: Path) -> None:
    knows_nothing = math.log(open_dataset(prepared).vocab_size)
    losses, val_losses = jobs.losses(seed_shaped["single"]), jobs.val_losses(seed_shaped["single"])
    assert losses[1] == pytest.approx(knows_nothing, abs=0.1)
    assert val_losses[50] < val_losses[25] < 0.9 * knows_nothing
    assert val_losses[50] < 0.8 * knows_nothing


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_dropout_does_not_depend_on_the_topology_either(whole: Callable[[str], Trained], strategy: str) -> None:
    one, several = (whole(name).run for name in ("single", strategy))
    assert list(jobs.losses(one)) == list(range(1, 37))
    assert jobs.losses(several) == pytest.approx(jobs.losses(one), abs=TOLERANCE)
    assert jobs.val_losses(several) == pytest.approx(jobs.val_losses(one), abs=TOLERANCE)


def test_a_modern_model_in_bfloat16_recomputed_and_sharded(prepared: Path, tmp_path: Path) -> None:
    modern = (
        *("--model.position=rope", "--model.norm=rmsnorm", "--model.mlp=swiglu", "--model.bias=false"),
        *("--model.qk_norm", "--model.n_kv_head=1", "--model.tied_head"),
        *("--train.dtype=bfloat16", "--train.steps=20", "--checkpoint.every=0"),
    )
    found = {}
    for strategy, arguments in {"single": (), "fsdp": (*ARGUMENTS["fsdp"], "--parallel.activation_checkpoint")}.items():
        run = tmp_path / strategy
        ended = jobs.train(RANKS[strategy], *tiny(prepared, run), *modern, *arguments)
        assert ended.code == 0, ended
        assert " parameters, computes in bfloat16" in ended.stdout
        assert {tensor.dtype for tensor in jobs.tensors(run / "checkpoints" / "step-00000020").values()} == {
            torch.float32
        }
        found[strategy] = jobs.losses(run) | jobs.val_losses(run)
    assert found["fsdp"] == pytest.approx(found["single"], abs=2e-3)
    assert found["single"][20] < found["single"][1] - 0.05


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "hsdp"])
def test_the_console_shows_progress_and_stderr_stays_empty(whole: Callable[[str], Trained], strategy: str) -> None:
    ended = whole(strategy).ended
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    ranks, accumulation = ranks_text(RANKS[strategy]), 4 // RANKS[strategy]
    for fact in (
        *(" tokens, vocabulary ", " parameters, computes in float32", f"devices   {RANKS[strategy]} x cpu ("),
        f"batch     8 sequences of 16 tokens = {ranks} x 2 x {accumulation} accumulation steps",
        *(f"strategy  {strategy}, ", f"starting in {whole(strategy).run}"),
    ):
        assert fact in ended.stdout
    assert len([line for line in lines if " | loss " in line]) == 36
    assert len([line for line in lines if " | val loss " in line]) == 3
    assert lines[-1].startswith("done: step 36 in ")
    assert lines[-2].startswith("goodput   ")
    assert "length    36 steps = 4,608 tokens, " in ended.stdout
    assert len([line for line in lines if line.startswith("time      32 more steps of ")]) == 1
    assert len(lines) == 7 + 36 + 3 + 1 + 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_directory_holds_what_the_contract_says(
    whole: Callable[[str], Trained], prepared: Path, strategy: str
) -> None:
    run = whole(strategy).run
    names = {
        *("LOCK", "checkpoints", "config.toml", "exit.json", "goodput.jsonl", "logs", "metrics.jsonl"),
        *("plots", "tb"),
    }
    assert {path.name for path in run.iterdir()} == names
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert (run / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = jobs.exit_report(run)
    assert (report["code"], report["cause"], report["rank"], report["step"]) == (0, "done", 0, 36)
    arguments = [*jobs.TINY, f"--data.path={prepared}", f"--run.dir={run}", *ARGUMENTS[strategy]]
    assert resolve([str(run / "config.toml")], {}) == resolve(arguments, {})


def test_metrics_have_the_fields_of_the_contract(whole: Callable[[str], Trained]) -> None:
    lines = jobs.metrics(whole("ddp").run)
    for line in lines:
        fields = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds"}
        fields |= {"loss_z", "grad_norm_z", "skipped"}
        if "val_loss" in line:
            fields = {"step", "val_loss", "val_perplexity", "val_bits_per_byte"}
            assert line["val_perplexity"] == pytest.approx(math.exp(line["val_loss"]))
        assert fields <= line.keys()
    trained = [line for line in lines if "loss" in line]
    assert [line["tokens"] for line in trained] == [step * 8 * 16 for step in range(1, 37)]
    assert {line["lr"] for line in trained} == {1e-3}
    assert all(line["seconds"] > 0 and line["grad_norm"] > 0 for line in trained)


@pytest.mark.parametrize(("strategy", "kept"), [("ddp", [36]), ("fsdp", [24, 30, 36])])
def test_the_newest_checkpoints_are_kept(whole: Callable[[str], Trained], strategy: str, kept: list[int]) -> None:
    # The last one is the best as well.
    assert jobs.checkpoints(whole(strategy).run) == [f"step-{step:08d}" for step in kept]


def test_tensorboard_shows_the_curves_the_config_and_samples(seed_shaped: dict[str, Path]) -> None:
    run = seed_shaped["fsdp"]
    accumulator = EventAccumulator(str(run / "tb"))
    accumulator.Reload()
    for tag, values in {TRAIN_LOSS: jobs.losses(run), VALIDATION_LOSS: jobs.val_losses(run)}.items():
        shown = {event.step: event.value for event in accumulator.Scalars(tag)}
        assert shown == pytest.approx(values, abs=1e-5)
    assert {"optim/learning_rate", "optim/grad_norm", THROUGHPUT} <= set(accumulator.Tags()["scalars"])
    samples = accumulator.Tensors("sample/text_summary")
    assert [event.step for event in samples] == [25, 50]
    written = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line["text"])) for line in written] == [(25, 40), (50, 40)]
    config = accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "n_embd = 48" in config
