"""The optimizer: parameter groups, AdamW's update by hand, and the learning rate schedules."""

import math
from collections.abc import Sequence
from typing import Literal, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distgpt.config import ModelConfig, OptimConfig
from distgpt.model.gpt import GPT
from distgpt.model.optim import build_optimizer, lr_at, parameter_groups
from distgpt.training.step import apply_update

Schedule = Literal["constant", "cosine", "wsd"]

SMALL = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4)


def small_model(seed: int = 0) -> GPT:
    model = GPT(SMALL, vocab_size=11)
    model.init_weights(seed)
    return model


def test_only_matrices_have_weight_decay() -> None:
    model = small_model()
    decayed, others = parameter_groups(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    other_names = {names[id(p)] for p in others["params"]}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert decayed_names | other_names == set(names.values())
    assert {"token_embedding.weight", "position_embedding.weight", "head.weight"} <= decayed_names
    assert other_names == {n for n in names.values() if n.endswith("bias") or "norm" in n}


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 0]


def test_adamw_takes_its_options_from_the_config() -> None:
    config = OptimConfig(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-4, weight_decay=0.2)
    optimizer = build_optimizer(small_model(), config, "cpu")
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-4)
        assert (group["weight_decay"], group["fused"]) == (decay, True)


def test_the_first_update_is_that_of_adamw() -> None:
    """With m = (1 - b1) g and v = (1 - b2) g^2, bias correction gives g / (|g| + eps); weight decay comes on top."""
    model = nn.Linear(3, 2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5), "cpu")
    for p in model.parameters():
        p.grad = torch.full_like(p, -3.0)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * (1 - 0.1 * 0.5) + 0.1)
    torch.testing.assert_close(model.bias.detach(), before["bias"] + 0.1)


def test_other_devices_leave_the_choice_of_kernel_to_torch() -> None:
    assert not build_optimizer(small_model(), OptimConfig(), "xpu").param_groups[0]["fused"]


@pytest.mark.usefixtures("one_process_group")
def test_fused_adamw_updates_sharded_parameters() -> None:
    plain, sharded = small_model(), small_model()
    mesh = init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    tokens = torch.arange(4).view(1, 4)
    for model in (plain, sharded):
        optimizer = build_optimizer(model, OptimConfig(lr=0.01), "cpu")
        assert [len(g["params"]) for g in optimizer.param_groups] == [7, 10]
        for _ in range(3):
            model(tokens, tokens).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(cast(DTensor, q).full_tensor(), p, msg=name)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warm_up_rises_in_equal_increments_to_the_peak(schedule: Schedule) -> None:
    config = OptimConfig(lr=0.5, min_lr=0.1, warmup_steps=4, schedule=schedule)
    assert [lr_at(s, config, 100) for s in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_without_warm_up_the_first_step_is_at_the_peak(schedule: Schedule) -> None:
    assert lr_at(0, OptimConfig(lr=0.5, schedule=schedule), 100) == 0.5


def test_the_constant_schedule_does_not_change() -> None:
    config = OptimConfig(lr=0.5, min_lr=0.1)
    assert {lr_at(s, config, 10) for s in range(12)} == {0.5}


def test_the_cosine_schedule_by_hand() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="cosine")
    expected = [0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * (s - 2) / 8)) for s in range(2, 11)]
    assert [lr_at(s, config, 11) for s in range(2, 11)] == pytest.approx(expected)
    assert lr_at(6, config, 11) == pytest.approx(0.6)
    assert lr_at(10, config, 11) == 0.2
    assert lr_at(50, config, 11) == 0.2


def test_the_wsd_schedule_by_hand() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=2, schedule="wsd", decay_fraction=0.4)
    rates = [lr_at(s, config, 10) for s in range(2, 12)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (1, 2), (5, 5), (5, 6), (9, 5), (0, 2)])
def test_rates_of_short_runs_are_between_min_lr_and_lr(schedule: Schedule, warmup: int, steps: int) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, schedule=schedule, decay_fraction=1.0)
    rates = [lr_at(s, config, steps) for s in range(steps)]
    assert all(0.1 <= rate <= 1.0 for rate in rates)
    if steps > warmup:
        assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("scale", [None, 1.7])
def test_exact_updates_are_adamws_and_do_not_depend_on_the_shards(scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = torch.randn(4, 5003, generator=generator).unbind()
    config = OptimConfig(lr=0.01)

    def trained(lengths: Sequence[int], *, exact: bool) -> Tensor:
        shards = [nn.Parameter(shard.clone()) for shard in torch.split(weights, list(lengths))]
        optimizer = build_optimizer(nn.ParameterList(shards), config, "cpu", exact=exact)
        for gradient in gradients:
            for shard, own in zip(shards, torch.split(gradient, list(lengths)), strict=True):
                shard.grad = own.clone()
            apply_update(optimizer, torch.tensor(scale or 1.0), clip=1.0)
        return torch.cat([shard.detach() for shard in shards])

    whole = trained([5003], exact=True)
    for lengths in ([1] * 9 + [4994], [7, 1661, 3335], [2500, 0, 2503]):
        assert torch.equal(trained(lengths, exact=True), whole)
    torch.testing.assert_close(whole, trained([5003], exact=False))
