"""The plan of a run that goes on, and what is said if its memory does not suffice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distgpt.config import resolve
from distgpt.corpus.shards import Dataset
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.training.startup import explaining_out_of_memory, plan_run
from tests.checkpoint.checkpoints import OnlyRun, trainee


def test_a_run_keeps_its_micro_batch_on_which_dropout_depends(
    dataset: Dataset, tmp_path: Path, one_process: Runtime
) -> None:
    def micro_batch(runtime: Runtime, *arguments: str) -> int:
        config = resolve(["--train.global_batch=24", *arguments], {})
        return plan_run(config, runtime, dataset, OnlyRun(tmp_path)).micro_batch

    three = replace(one_process, world_size=3, local_world_size=3)
    assert [micro_batch(runtime) for runtime in (one_process, three)] == [12, 8]
    subject = trainee(tmp_path, dataset, "--train.global_batch=24", "--train.micro_batch=6")
    subject.learn()
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.wait()
    assert micro_batch(one_process) == 6
    assert micro_batch(three) == 8  # 6 does not divide the 8 sequences of a rank
    assert micro_batch(one_process, "--train.micro_batch=2") == 2


@pytest.mark.parametrize(
    ("arguments", "fix"),
    [
        (("--train.micro_batch=8",), "--train.micro_batch=4 should fit"),
        (
            ("--train.micro_batch=1",),
            "try --parallel.activation_checkpoint or --model.loss_chunk=1024 or parallel.strategy=fsdp on several GPUs",
        ),
    ],
)
def test_out_of_memory_names_what_fits(
    dataset: Dataset, one_process: Runtime, arguments: tuple[str, ...], fix: str
) -> None:
    config = resolve(arguments, {})
    plan = make_plan(config, one_process, vocab_size=dataset.vocab_size)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    with pytest.raises(UsageError) as caught, explaining_out_of_memory(config, plan, dataset):
        raise error
    size = plan.micro_batch
    expected = f"out of memory with micro-batches of {size} (CUDA out of memory. Tried to allocate 2 GiB): {fix}"
    assert str(caught.value) == expected
