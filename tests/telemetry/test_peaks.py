"""Peak speeds: exact figures for the listed devices, none for other devices."""

import time
from functools import partial

import pytest
import torch

from distgpt.telemetry.peaks import device_peak_flops, named_peak_flops


@pytest.mark.parametrize(
    ("name", "bfloat16", "tf32", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12, 66.9e12),
        ("NVIDIA H200", 989.4e12, 494.7e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12, 51.2e12),
        ("NVIDIA H100 NVL", 835.5e12, 417.7e12, 60e12),
        ("NVIDIA B200", 2250e12, 1125e12, 75e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12, 19.5e12),
        ("NVIDIA A10", 125e12, 62.5e12, 31.2e12),
        ("NVIDIA A10G", 70e12, 35e12, 31.5e12),
        ("NVIDIA L4", 121e12, 60e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 183e12, 91.6e12),
        ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12, 35.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 82.6e12),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9e12, 43.9e12, 43.9e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12, 182.1e12, 91.1e12),
        ("NVIDIA RTX A5000", 111.1e12, 55.6e12, 27.8e12),
        ("NVIDIA B300 SXM6 AC", 2250e12, 1125e12, 75e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12, 15.7e12),
    ],
)
def test_listed_devices(name: str, bfloat16: float | None, tf32: float, float32: float) -> None:
    assert named_peak_flops(name, torch.bfloat16, tf32=False) == pytest.approx(bfloat16)
    assert named_peak_flops(name, torch.float32, tf32=True) == pytest.approx(tf32)
    assert named_peak_flops(name, torch.float32, tf32=False) == pytest.approx(float32)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A1000",
        "AMD Instinct MI300X",
        "NVIDIA X900",
    ],
)
def test_an_unlisted_gpu_has_no_figure(name: str) -> None:
    assert named_peak_flops(name, torch.bfloat16, tf32=False) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_is_measured_quickly(dtype: torch.dtype) -> None:
    device_peak_flops(torch.device("cpu"), dtype)
    started = time.perf_counter()
    peak = device_peak_flops(torch.device("cpu"), dtype)
    assert time.perf_counter() - started < 2, "0.3 s on an idle machine"
    assert peak is not None
    assert 1e8 < peak < 1e15


def test_a_slow_first_round_is_not_taken_for_the_speed_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processors are busy with other work at first, then for threads that wait for each other."""
    clock = 0.0

    def timed(product: partial[torch.Tensor], *, number: int, repeat: int) -> list[float]:
        nonlocal clock
        seconds = 2 * product.args[0].shape[0] ** 3 / 1e11 + (
            0.025 if clock < 0.05 or torch.get_num_threads() > 1 else 0
        )
        clock += repeat * seconds
        return [seconds] * repeat

    threads = torch.get_num_threads()
    monkeypatch.setattr("timeit.repeat", timed)
    monkeypatch.setattr("time.perf_counter", lambda: clock)
    assert device_peak_flops(torch.device("cpu"), torch.float32) == pytest.approx(1e11)
    assert clock < 0.5
    assert torch.get_num_threads() == threads


def test_an_unknown_type_of_device_has_no_figure() -> None:
    assert device_peak_flops(torch.device("meta"), torch.float32) is None
