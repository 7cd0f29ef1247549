"""A rank: its place, its store, its share of the cores, and its dtype."""

import io
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distgpt.config import TrainConfig
from distgpt.distributed import runtime as runtime_module
from distgpt.distributed.device import compiles, compute_dtype, missing_for_triton, set_numerics, threads_per_rank
from distgpt.distributed.process_group import init_process_group, shared_store
from distgpt.distributed.runtime import Runtime, this_rank
from distgpt.errors import UsageError
from tests import jobs

CPU = torch.device("cpu")
GLOO = "pt_gloo_runloop"
TRAIN_AND_LEAVE = """
import time
from contextlib import suppress
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from torch import nn, ones
# All that torch imports for it before there is a group.
from distgpt.distributed.parallelize import DistributedDataParallel
from distgpt.distributed.process_group import process_group
from distgpt.distributed.runtime import this_rank

def threads():
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it may have ended since
            found.add((task / "comm").read_text().strip())
    return found

def step():
    model = DistributedDataParallel(nn.Linear(1, 1))
    model.cycle = [model]
    model(ones(1)).backward()
    return threads()

with process_group(this_rank(), timeout=60):
    print(*step())
for _ in range(100):  # a thread that was joined is listed for a moment more
    if "pt_gloo_runloop" in threads():
        time.sleep(0.05)
print(*threads())
"""


def test_one_process_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    runtime = this_rank()
    assert (runtime.rank, runtime.local_rank, runtime.world_size, runtime.local_world_size) == (0, 0, 1, 1)
    assert not runtime.distributed


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants more ranks than GPUs")
def test_the_rank_is_read_from_the_environment_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    runtime = this_rank()
    assert (runtime.rank, runtime.local_rank, runtime.world_size, runtime.local_world_size) == (5, 1, 8, 4)
    assert runtime.distributed


@pytest.mark.parametrize(("shared", "met"), [("False", True), ("True", False)])
def test_each_attempt_has_a_store_of_its_own(monkeypatch: pytest.MonkeyPatch, shared: str, met: bool) -> None:
    """The agent of a host that joined late has counted fewer restarts than the others."""
    agents = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = agents.port if shared == "True" else free_port()
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1"}
    stores = []
    for rank, restarts in enumerate(("1", "0")):
        variables |= {"RANK": str(rank), "TORCHELASTIC_RESTART_COUNT": restarts, "TORCHELASTIC_USE_AGENT_STORE": shared}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        stores.append(shared_store(Runtime(rank, 0, 2, 1, torch.device("cpu"))))
    stores[0].set("here", "yes")
    stores[0].get("here")  # set() does not wait
    assert stores[1].check(["here"]) == met


@jobs.linux_only
def test_no_model_outlives_the_process_group() -> None:
    """Otherwise the model destroys the group while it holds the GIL, for which a thread of the group may wait."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", TRAIN_AND_LEAVE]
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(jobs.run, command, RANK=rank, **variables) for rank in ("0", "1")]
    for rank in ranks:
        inside, after = rank.result().stdout.splitlines()
        assert (GLOO in inside.split(), GLOO in after.split()) == (True, False)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_more_ranks_than_gpus_is_refused_with_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"4 ranks on this host but 2 GPUs: use --nproc_per_node=2"):
        this_rank()


def test_gpus_that_torch_cannot_use_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An old driver: torch would train on the CPU, with a rank for each GPU."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update it.\nMore")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    assert not runtime_module.gpus_are_expected(tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not runtime_module.gpus_are_expected(tmp_path)
    (tmp_path / "nvidia0").touch()
    meant = runtime_module.gpus_are_expected
    monkeypatch.setattr(runtime_module, "gpus_are_expected", lambda: meant(tmp_path))
    with pytest.raises(
        UsageError, match=r"cannot use them \(The NVIDIA driver .* Please update it\): update the driver"
    ):
        this_rank()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert this_rank().device == CPU


@pytest.mark.parametrize(
    ("here", "asked", "chosen"),
    [
        ({"cuda", "mps"}, "auto", "cuda"),
        ({"mps"}, "auto", "mps"),
        (set(), "auto", "cpu"),
        ({"cuda", "mps"}, "mps", "mps"),
        ({"cuda", "mps"}, "cpu", "cpu"),
        (set(), "cuda", "the device is cuda, but PyTorch .* finds none here: take auto or cpu"),
        ({"cuda"}, "mps", "the device is mps, but PyTorch .* finds none here: take auto or cpu"),
    ],
)
def test_the_device_is_the_one_asked_for_or_the_fastest(
    monkeypatch: pytest.MonkeyPatch, here: set[str], asked: str, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(here & {"cuda"}))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in here)
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if " " in chosen:
        with pytest.raises(UsageError, match=chosen):
            this_rank(asked)
    else:
        assert this_rank(asked).device.type == chosen


def test_an_apple_gpu_trains_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UsageError, match=r"2 ranks, but an Apple GPU trains with one: .* or take --train.device=cpu"):
        this_rank()
    assert this_rank("cpu").device == CPU


def test_an_apple_gpu_sums_in_float64_on_the_cpu() -> None:
    assert Runtime(0, 0, 1, 1, torch.device("mps")).float64_device == CPU
    assert Runtime(0, 0, 1, 1, torch.device("cuda", 0)).float64_device == torch.device("cuda", 0)


def test_the_data_type_on_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, or bfloat16 if that is asked for and this macOS has it."""
    apple = torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
    found = {asked: compute_dtype(asked, apple) for asked in ("auto", "float32", "bfloat16")}
    assert found == {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    assert compute_dtype("auto", apple) == torch.float32
    with pytest.raises(UsageError, match=r"needs macOS 14: take --train.dtype=float32"):
        compute_dtype("bfloat16", apple)


def test_a_device_is_set_before_its_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **others: calls.append(others["device_id"]))
    gpu = torch.device("cuda", 3)
    init_process_group(Runtime(3, 3, 4, 4, gpu), dist.HashStore(), timeout=1)
    assert calls == [gpu, gpu]


def test_numerics_are_those_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_numerics(TrainConfig())
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.are_deterministic_algorithms_enabled()
        set_numerics(TrainConfig(tf32=True, deterministic=True))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.use_deterministic_algorithms(False)


def test_local_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_per_rank(n) for n in (1, 2, 3, 8, 100)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert threads_per_rank(1) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # the 1 is torchrun's default, not the user's choice
    assert threads_per_rank(2) == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_per_rank(8) == 3


def test_dtype_is_the_configured_one_or_bfloat16_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute_dtype("float32", CPU) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    for flags, expected in (
        ("fpu avx512f avx512_bf16 fsrm", torch.bfloat16),
        ("fpu amx_bf16 amx_tile", torch.bfloat16),
        ("fpu avx512f avx512_vnni", torch.float32),
    ):
        monkeypatch.setattr("builtins.open", lambda *_, flags=flags: io.StringIO(f"flags\t\t: {flags}\n"))
        assert compute_dtype("auto", CPU) == expected


def test_a_model_is_compiled_for_gpus_where_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("distgpt.distributed.device.missing_for_triton", lambda: "")
    assert compiles("auto", gpu) == compiles(True, gpu) == compiles(True, CPU) == (True, "compiled")
    assert compiles("auto", CPU) == compiles(False, gpu) == (False, "")
    monkeypatch.setattr("distgpt.distributed.device.missing_for_triton", lambda: "a C compiler")
    assert compiles("auto", gpu) == (False, "not compiled, and so slower: a C compiler is missing")
    with pytest.raises(UsageError, match=r"train.compile needs a C compiler: install it, or set train.compile=false"):
        compiles(True, gpu)


def test_a_missing_compiler_or_header_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: name if name == "icx" else None)
    monkeypatch.delenv("CC", raising=False)
    assert missing_for_triton().startswith("a C compiler (gcc, clang, ")
    monkeypatch.setenv("CC", "icx")
    assert missing_for_triton() == ""
    (tmp_path / "Python.h").unlink()
    assert missing_for_triton().startswith(f"{tmp_path}/Python.h (")
