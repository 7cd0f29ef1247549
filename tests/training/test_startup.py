"""The plan of a run that goes on, what must be equal on all ranks, and the error if memory does not suffice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distgpt.checkpoint import compatibility
from distgpt.checkpoint.manifest import RunState
from distgpt.config import resolve, to_dict
from distgpt.corpus.shards import Dataset
from distgpt.distributed import device
from distgpt.distributed.plan import make_plan
from distgpt.distributed.runtime import Runtime
from distgpt.errors import UsageError
from distgpt.training import startup
from distgpt.training.startup import explaining_out_of_memory, plan_run
from tests.checkpoint.checkpoints import SMALL, OnlyRun, trainee


def test_a_run_keeps_its_micro_batch_on_which_rounding_depends(
    dataset: Dataset, tmp_path: Path, one_process: Runtime
) -> None:
    def micro_batch(runtime: Runtime, *arguments: str) -> int:
        config = resolve([*SMALL, "--train.global_batch=24", *arguments], {})
        return plan_run(config, runtime, dataset, OnlyRun(tmp_path)).micro_batch

    three = replace(one_process, world_size=3, local_world_size=3)
    assert [micro_batch(runtime) for runtime in (one_process, three)] == [24, 8]
    subject = trainee(tmp_path, dataset, "--train.global_batch=24", "--train.micro_batch=6")
    subject.learn()
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.wait()
    assert micro_batch(one_process) == 6
    assert micro_batch(three) == 8  # 6 does not divide the 8 sequences of a rank
    assert micro_batch(one_process, "--train.micro_batch=2") == 2
    exact = "--parallel.reduction=exact"
    assert micro_batch(one_process, exact) == 6
    assert micro_batch(three, exact, "--train.micro_batch=8") == 8
    with pytest.raises(UsageError, match="3 ranks cannot share: take a number of ranks that divides 4, or set"):
        micro_batch(three, exact)


def test_a_run_keeps_the_data_type_that_auto_was(
    dataset: Dataset, tmp_path: Path, one_process: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtype(flags: str, *arguments: str) -> torch.dtype:
        monkeypatch.setattr(device, "cpu_has_one_of", lambda wanted: flags in wanted)
        return plan_run(resolve([*SMALL, *arguments], {}), one_process, dataset, OnlyRun(tmp_path)).dtype

    assert [dtype(flags) for flags in ("", "avx512_bf16")] == [torch.float32, torch.bfloat16]
    subject = trainee(tmp_path, dataset, "--train.dtype=bfloat16")
    subject.learn()
    subject.checkpointer.save(1, val_loss=None)
    subject.checkpointer.wait()
    assert dtype("") == torch.bfloat16
    assert dtype("", "--train.dtype=float32") == torch.float32


def test_a_run_of_a_version_that_did_not_record_its_data_type_goes_on_in_that(
    dataset: Dataset, tmp_path: Path, one_process: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtype(flags: str, asked_then: str) -> torch.dtype:
        state = RunState(1, None, to_dict(resolve([f"--train.dtype={asked_then}"], {})), "", "", 9, None, 4)
        monkeypatch.setattr(startup, "require_same_run", lambda *_, replicas: state)
        for module in (device, compatibility):
            monkeypatch.setattr(module, "cpu_has_one_of", lambda wanted: flags in wanted)
        return plan_run(resolve([], {}), one_process, dataset, OnlyRun(tmp_path)).dtype

    assert dtype("avx512_bf16", "auto") == torch.float32  # where auto is bfloat16 now
    assert dtype("amx_bf16", "auto") == torch.bfloat16
    assert dtype("avx512_bf16", "float32") == torch.float32


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


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_ranks_that_would_compute_in_unlike_dtypes_are_refused(
    one_process: Runtime, monkeypatch: pytest.MonkeyPatch, own: torch.dtype
) -> None:
    plan = replace(make_plan(resolve([], {}), one_process, vocab_size=9), dtype=own)
    monkeypatch.setattr(startup, "hosts_of_ranks", lambda runtime: ["old", "new", "old"])
    for other, refused in ((1.0, own == torch.float32), (0.0, own == torch.bfloat16)):
        monkeypatch.setattr(startup, "all_gather_row", lambda row, runtime, other=other: [row, [other], row])
        if refused:
            with pytest.raises(UsageError, match=r"train.dtype=auto is float32 on (old|new) and bfloat16 elsewhere"):
                startup.require_same_dtype(plan)
        else:
            startup.require_same_dtype(plan)
