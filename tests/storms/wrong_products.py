"""A rank whose matrix products are wrong: the program of the processes that test_wrong_products.py starts.

Usage, in the process of rank $RANK: `python -m tests.storms.wrong_products RANKS TRIALS SEED DIRECTORY`. In each trial
one rank flips a bit in the result of a product, in the forward or in the backward pass, in the checked step. Rank 0
writes what came of the trials to DIRECTORY.
"""

import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distgpt.config import resolve
from distgpt.distributed.collectives import all_gather_json
from distgpt.distributed.gradients import ExactGradients, gradients_of
from distgpt.distributed.parallelize import build_model
from distgpt.distributed.plan import make_plan
from distgpt.distributed.process_group import LOOPBACK, init_process_group
from distgpt.distributed.runtime import Runtime
from distgpt.errors import DataError
from distgpt.training.cross_check import CrossCheck
from distgpt.training.step import accumulate_gradients

OPTIONS = (
    *("--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16", "--model.block_size=16", "--model.dropout=0.1"),
    *("--train.global_batch=12", "--train.micro_batch=2", "--parallel.reduction=exact", "--health.check_every=1"),
)
VOCABULARY = 30


@dataclass(frozen=True)
class Trial:
    """The fault of a trial: always there, or in one product alone."""

    rank: int
    module: str
    backward: bool
    bit: int
    constant: bool


@dataclass(frozen=True)
class Result:
    """What came of a trial: the message, empty if nothing was found, and whether any gradient had changed."""

    trial: Trial
    message: str
    changed: bool


def draw_trial(draw: random.Random, ranks: int, modules: list[str]) -> Trial:
    """Draw a fault."""
    return Trial(
        rank=draw.randrange(ranks),
        module=draw.choice(modules),
        backward=draw.random() < 0.5,
        bit=draw.randrange(32),
        constant=draw.random() < 0.5,
    )


def flipping(trial: Trial, last: int) -> Callable[[Tensor], Tensor]:
    """Return what flips the bit: in each product that it is given or, if it comes and goes, in number `last` alone."""
    calls = 0

    def flip(product: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if not trial.constant and calls != last:
            return product
        wrong = product.clone()
        number = wrong.view(torch.int32).view(-1)[trial.bit % wrong.numel()]
        number.bitwise_xor_(torch.tensor(1 << trial.bit if trial.bit < 31 else -(2**31), dtype=torch.int32))
        return wrong

    return flip


def disturb(module: nn.Module, trial: Trial, last: int) -> None:
    """Let a linear layer compute wrongly."""
    flip = flipping(trial, last)
    if trial.backward:
        module.register_full_backward_hook(lambda module, inputs, outputs: tuple(map(flip, inputs)))
    else:
        module.register_forward_hook(lambda module, inputs, output: flip(output))


def attempt(runtime: Runtime, trial: Trial | None) -> tuple[str, list[int]]:
    """Compute a step and compare it. Returns the message, and the digests of all ranks' last micro-batches."""
    strategy = "ddp" if trial is None or trial.bit % 2 else "fsdp"
    config = resolve([*OPTIONS, f"--parallel.strategy={strategy}", "--train.dtype=float32"], {})
    plan = make_plan(config, runtime, vocab_size=VOCABULARY)
    model = build_model(config, plan, vocab_size=VOCABULARY, eot_id=None)
    gradients: Any = gradients_of(model, plan)
    assert isinstance(gradients, ExactGradients)
    if trial is not None and trial.rank == runtime.rank:
        disturb(model.get_submodule(trial.module), trial, plan.accumulation)
    tokens = torch.randint(VOCABULARY, (12, 17), generator=torch.Generator().manual_seed(1))
    own = tokens.chunk(runtime.world_size)[runtime.rank]
    micro_batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in torch.split(own, 2)]
    check = CrossCheck(gradients, config, first_step=1)
    losses = accumulate_gradients(gradients, micro_batches, 1, seed=config.run.seed)
    assert gradients.digest is not None
    digests: list[int] = all_gather_json(gradients.digest.item())
    message = ""
    try:
        check.compare(1, micro_batches[-1])
    except DataError as error:
        message = str(error)
    gradients.finish(losses, stop=False)
    return message, digests


def main(ranks: str, trials: str, seed: str, directory: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    rank, count, draw = int(os.environ["RANK"]), int(ranks), random.Random(int(seed))
    runtime = Runtime(rank, rank, count, count, torch.device("cpu"))
    init_process_group(runtime, dist.FileStore(str(Path(directory, f"store-{count}")), count), 120.0)
    names = ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    modules = [f"blocks.{layer}.{name}" for layer in range(2) for name in names]
    results, honest = [], {}
    for _ in range(int(trials)):
        trial = draw_trial(draw, count, modules)
        strategy = trial.bit % 2
        message, digests = attempt(runtime, trial)
        if strategy not in honest:
            never = Trial(rank=-1, module=modules[0], backward=False, bit=trial.bit, constant=False)
            found, honest[strategy] = attempt(runtime, never)
            assert found == ""
        results.append(Result(trial, message, changed=digests != honest[strategy]))
    if rank == 0:
        Path(directory, "results.json").write_text(json.dumps([asdict(result) for result in results]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
