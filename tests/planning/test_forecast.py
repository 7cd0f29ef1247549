"""Plans: what is counted equals a real model, its checkpoint and its allocations; what is recommended fits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distgpt.config import Config, preset_names, resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.plan import make_plan, planned_memory
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.model.gpt import GPT, meta_model
from distgpt.model.optim import build_optimizer
from distgpt.planning import layouts
from distgpt.planning.devices import DEVICES, device_named
from distgpt.planning.forecast import Forecast, explain_no_fit, forecast
from distgpt.planning.grade import grade
from distgpt.planning.layouts import GIB, make_cluster
from distgpt.planning.text import describe
from distgpt.planning.traffic import replica_traffic, shard_traffic
from tests.checkpoint.checkpoints import trainee
from tests.distributed.test_memory import LiveBytes


def planned(
    arguments: str, *, device: str = "h100", nodes: int = 1, per_node: int = 8, network: float | None = None
) -> tuple[Config, Forecast]:
    config = resolve(arguments.split(), {})
    cluster = make_cluster(device, device_named(device), config, nodes=nodes, per_node=per_node, network=network)
    return config, forecast(config, cluster, arguments.split())


@pytest.fixture
def cpu_of_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "device_peak_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.mark.usefixtures("cpu_of_known_speed")
def test_a_step_allocates_what_is_planned() -> None:
    """Weights, gradients, moments, activations and logits of two micro-batches on a CPU, to 5%."""
    flags = "--train.dtype=float32 --model.n_embd=64 --model.n_layer=3 --model.n_head=4 --train.micro_batch=2"
    config, plan = planned(f"gpt2-124m {flags} --model.block_size=128 --train.global_batch=4", device="cpu", per_node=1)
    layout = plan.layouts[0]
    tokens_BT = torch.zeros(2, 128, dtype=torch.int64)
    with LiveBytes([]) as live:
        model = GPT(config.model, plan.vocab_size)
        optimizer = build_optimizer(model, config.optim, "cpu")
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(layout.accumulation):
                model(tokens_BT, tokens_BT).mean().backward()
            optimizer.step()
    assert layout.accumulation == 2
    assert layout.memory.total == pytest.approx(live.peak, rel=0.05)
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert (layout.memory.weights, layout.memory.gradients, layout.memory.optimizer) == (weights, weights, moments)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.flops_per_token == model.flops_per_token()


@pytest.mark.usefixtures("cpu_of_known_speed")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_has_the_planned_size(dataset: Dataset, tmp_path: Path, name: str) -> None:
    size = f"--model.n_embd=192 --model.n_layer=2 --model.n_head=2 --model.block_size=8 --optim.name={name}"
    subject = trainee(tmp_path, dataset, *size.split())
    subject.learn()
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.wait()
    written = sum(file.stat().st_size for file in tmp_path.glob("checkpoints/step-*/*"))
    _, plan = planned(f"{size} --data.path={dataset.path}", device="cpu", per_node=1)
    assert plan.vocab_size == dataset.vocab_size
    assert plan.checkpoint_bytes == pytest.approx(written, rel=0.05)
    moments = sum(t.nbytes for state in subject.optimizer.state.values() for t in state.values() if t.ndim)
    assert plan.layouts[0].memory.optimizer == moments


def test_shards_are_exact_even_if_they_do_not_divide() -> None:
    _, plan = planned("gpt2-124m --train.global_batch=510", per_node=5)
    fsdp = next(layout for layout in plan.layouts if layout.strategy == "fsdp")
    model = meta_model(resolve(["gpt2-124m"], {}).model, plan.vocab_size)
    assert fsdp.memory.weights == sum(torch.chunk(p, 5)[0].nbytes for p in model.parameters())


def test_one_of_several_nodes_sends_as_much_as_a_ring() -> None:
    across = replica_traffic(80, ranks=16, shards=4, per_node=8)
    assert (across.rank, across.within, across.between) == (30, 30, 120)  # 2 x 20 x 3/4; four groups leave a node
    alone = replica_traffic(80, ranks=16, shards=8, per_node=8)
    assert (alone.rank, alone.within, alone.between) == (10, 0, 80)
    whole = shard_traffic(80, shards=16, per_node=8)
    assert (whole.rank, whole.within, whole.between) == (75, 75, 75)
    assert shard_traffic(80, shards=8, per_node=8).between == 0


def test_what_a_slow_network_delays_is_not_recommended() -> None:
    _, fast = planned("modern-1b", device="a100", nodes=2)
    flags = "--parallel.reduce=micro_batch --parallel.reshard=true"
    _, slow = planned(f"modern-1b {flags}", device="a100", nodes=2, network=10)
    assert fast.best is not None
    assert slow.best is not None
    seconds = {layout.strategy: layout.step_seconds for layout in slow.layouts if not layout.activation_checkpoint}
    assert seconds["fsdp"] > seconds["hsdp"] > fast.best.step_seconds
    assert slow.best.strategy != "fsdp"
    assert fast.best.mfu == pytest.approx(DEVICES["a100"].mfu)


def test_a_strategy_that_is_asked_for_is_kept() -> None:
    _, plan = planned("gpt2-124m --parallel.strategy=fsdp")
    assert plan.best is not None
    assert plan.best.strategy == "fsdp"


def test_the_command_trains_in_the_best_layout() -> None:
    _, one = planned("modern-7b --train.micro_batch 2 --optim.lr 1e-4", per_node=8)
    assert one.command == (
        "torchrun --standalone --nproc_per_node=8 -m distgpt.train modern-7b --optim.lr 1e-4 "
        "--parallel.strategy=fsdp --train.micro_batch=2 --parallel.activation_checkpoint=false"
    )
    _, many = planned("gpt2-124m", nodes=4)
    command = (
        "sbatch --nodes=4 --gpus-per-node=8 slurm/train.sh gpt2-124m --parallel.strategy=ddp --train.micro_batch=16"
    )
    assert many.command == command


def test_what_does_not_fit_says_what_would() -> None:
    config, plan = planned("gpt2-1558m", device="4090", per_node=1)
    assert plan.best is None
    assert (plan.command, plan.seconds) == (None, None)
    assert explain_no_fit(config, plan) == (
        "nothing fits: a rank needs at least 27.0 GiB, and training may take 21.2 of the 23.5 GiB of a 4090; it would "
        "fit on 2 x 4090 (fsdp), or on 1 x 5090, or as a smaller model, modern-1b"
    )
    config, plan = planned("modern-1b --model.block_size=8192", device="4090", per_node=1)
    assert "; it would fit with --model.loss_chunk=1024, or on 2 x 4090 (" in explain_no_fit(config, plan)
    _, plan = planned("modern-1b --model.block_size=8192 --model.loss_chunk=1024", device="4090", per_node=1)
    assert plan.best is not None
    config, plan = planned("gpt2-1558m --parallel.strategy=ddp", device="4090", per_node=4)
    assert "; it would fit with --parallel.strategy=fsdp" in explain_no_fit(config, plan)


def test_a_budget_buys_steps_and_names_the_compute_optimal_size() -> None:
    config = resolve(["gpt2-350m"], {})
    cluster = make_cluster("h100", device_named("h100"), config, nodes=1, per_node=8)
    plan = forecast(config, cluster, ["gpt2-350m"], budget=24, price=2)
    assert plan.optimum is not None
    assert plan.optimum.flops == pytest.approx(24 * 3600 * 989.4e12 * 0.4)
    assert plan.optimum.flops == pytest.approx(6 * plan.optimum.parameters * plan.optimum.tokens)
    assert plan.optimum.tokens == 20 * plan.optimum.parameters
    assert plan.gpu_hours == pytest.approx(24, rel=1e-3)
    assert plan.cost == pytest.approx(48, rel=1e-3)
    assert plan.command is not None
    assert f"--train.steps={plan.steps}" in plan.command
    with pytest.raises(UsageError, match="less than one step"):
        forecast(config, cluster, ["gpt2-350m"], budget=1e-6)
    by_tokens = forecast(config, cluster, ["gpt2-350m"], tokens=7e9)
    assert by_tokens.tokens == pytest.approx(7e9, rel=1e-3)


def test_lines_fit_a_terminal_even_for_thousands_of_ranks() -> None:
    for preset in preset_names():
        for device, nodes in (("a100-40gb", 1024), ("4090", 1)):
            per_node = DEVICES[device].per_node
            config, plan = planned(f"{preset} --train.global_batch=8192", device=device, nodes=nodes, per_node=per_node)
            text = describe(config, plan, price=2.5)
            assert max(map(len, text.splitlines())) <= 80, text
            assert len(plan.layouts) == (6 if nodes > 1 else 2)


def test_diloco_is_planned_where_it_is_asked_for() -> None:
    _, plan = planned("gpt2-124m --parallel.strategy=diloco --train.steps=500 --eval.every=100", nodes=2)
    assert plan.best is not None
    assert plan.best.strategy == "diloco"
    assert plan.best.memory.optimizer == pytest.approx(16 * plan.parameters / 8, rel=1e-3)
    hsdp = next(layout for layout in plan.layouts if layout.strategy == "hsdp")
    assert plan.best.bytes_between_nodes == pytest.approx(hsdp.bytes_between_nodes / 50)
    assert plan.checkpoint_bytes == plan.parameters * (12 * 2 + 8)


@pytest.mark.parametrize(("name", "hint"), [("h1000", "did you mean h100?"), ("rtx4090", "did you mean 4090?")])
def test_an_unknown_device_names_the_nearest_one(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        device_named(name)
    assert hint in str(caught.value)


def test_a_run_is_compared_with_its_plan(one_process: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(["--train.dtype=float32", "--train.micro_batch=4", "--train.global_batch=8"], {})
    plan = make_plan(config, one_process, vocab_size=65)
    flops = 8 * 256 * GPT(config.model, 65).flops_per_token()
    line = grade(config, plan, 3.0, vocab_size=65, peak=flops / 0.4 / 2)
    assert line == "plan      step 3000 ms, planned 2000 ms at an MFU of 40% (+50%)"
    line = grade(config, plan, 3.0, vocab_size=65, peak=None)
    assert line is not None
    assert "no peak" in line
    narrow = replace(config, model=replace(config.model, n_embd=96))
    assert grade(narrow, plan, 3.0, vocab_size=65, peak=1e11) is None
    gpu = replace(one_process, device=torch.device("cuda", 0), memory=80 * GIB)
    need = planned_memory(config, plan, 4, vocab_size=65).total
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("distgpt.planning.grade.memory_bytes", lambda device: int(1.1 * need))
    line = grade(config, replace(plan, runtime=gpu), 1.0, vocab_size=65, peak=flops / 0.4 / 2)
    assert line is not None
    assert "step 1000 ms, planned 2000 ms at an MFU of 40% (-50%); memory " in line
    assert line.endswith("(+10%)")
