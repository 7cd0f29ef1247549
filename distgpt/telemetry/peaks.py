"""The peak speed of a device in matrix products. A run's share of it is its MFU (model FLOPs utilization)."""

import re
import time
import timeit
from functools import partial

import torch

TERA = 1e12

# Dense peaks in TFLOP/s from NVIDIA's data sheets and whitepapers, without sparsity, accumulating in float32:
# bfloat16, float32 on the tensor cores (TF32), float32. None: the device does not support it. The whole name must
# match: for a MIG slice, a laptop GPU or a variant that is not listed, no figure is better than a wrong one.
PEAKS: tuple[tuple[str, float | None, float | None, float], ...] = (
    (r"GB[23]00", 2500, 1250, 80),
    (r"B200|B300( SXM6 AC)?", 2250, 1125, 75),
    (r"H200|GH200 .*|H100 80GB HBM3|H800", 989.4, 494.7, 66.9),
    (r"H200 NVL|H100 NVL", 835.5, 417.7, 60),
    (r"H100 PCIe", 756, 378, 51.2),
    (r"H20", 148, 74, 44),
    (r"A(100|800)-(SXM4|SXM|PCIE)-(40|80)GB|A(100|800) 80GB PCIe", 312, 156, 19.5),
    (r"A30", 165, 82, 10.3),
    (r"A40", 149.7, 74.8, 37.4),
    (r"A10", 125, 62.5, 31.2),
    (r"A10G", 70, 35, 31.5),
    (r"L40S", 362, 183, 91.6),
    (r"L40", 181, 90.5, 90.5),
    (r"L4", 121, 60, 30.3),
    (r"V100-SXM[23]-\d+GB.*", None, None, 15.7),
    (r"V100-PCIE-\d+GB", None, None, 14),
    (r"T4", None, None, 8.1),
    (r"RTX PRO 6000 Blackwell Workstation Edition", 503.8, 251.9, 126),
    (r"RTX 6000 Ada Generation", 364.2, 182.1, 91.1),
    (r"RTX A6000", 154.8, 77.4, 38.7),
    (r"RTX A5000", 111.1, 55.6, 27.8),
    (r"RTX 3080", 59.5, 29.8, 29.8),
    (r"RTX 3080 Ti", 68.2, 34.1, 34.1),
    (r"RTX 3090", 71, 35.6, 35.6),
    (r"RTX 3090 Ti", 80, 40, 40),
    (r"RTX 4070", 58.3, 29.1, 29.1),
    (r"RTX 4070 SUPER", 70.9, 35.5, 35.5),
    (r"RTX 4070 Ti", 80.2, 40.1, 40.1),
    (r"RTX 4070 Ti SUPER", 88.2, 44.1, 44.1),
    (r"RTX 4080", 97.5, 48.7, 48.7),
    (r"RTX 4080 SUPER", 104.4, 52.2, 52.2),
    (r"RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 5070", 61.7, 30.9, 30.9),
    (r"RTX 5070 Ti", 87.9, 43.9, 43.9),
    (r"RTX 5080", 112.6, 56.3, 56.3),
    (r"RTX 5090", 209.5, 104.8, 104.8),
)

# A CPU is measured for so many seconds, with larger and larger matrices as long as the next size fits.
MEASURE_SECONDS = 0.2
REPEATS = 4


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of matrix products in `dtype` (bfloat16 or float32) on `device`; None if it is unknown.

    A GPU's peak comes from the table; a CPU's is measured, in at most 0.3 s, with the threads that torch now uses.
    """
    if device.type == "cpu":
        return _measure_peak(dtype)
    if device.type != "cuda":
        return None
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return named_peak_flops(torch.cuda.get_device_name(device), dtype, tf32=tf32)


def named_peak_flops(name: str, dtype: torch.dtype, *, tf32: bool) -> float | None:
    """Return the peak FLOP/s of a GPU by its name. `tf32`: float32 products may run on the tensor cores."""
    model = product_name(name)
    for pattern, bfloat16, tensor_float32, float32 in PEAKS:
        if re.fullmatch(pattern, model):
            peak = bfloat16 if dtype == torch.bfloat16 else (tf32 and tensor_float32) or float32
            return None if peak is None else peak * TERA
    return None


def product_name(name: str) -> str:
    """Return the name of a GPU without its brand: H100 80GB HBM3, RTX 4090."""
    return re.sub(r"^(NVIDIA |Tesla |GeForce )*", "", name)


def _measure_peak(dtype: torch.dtype) -> float:
    """Return the best FLOP/s of square matrix products, with all threads and, half of the time, with one.

    On a busy machine, threads that wait for each other can be a hundred times slower than one of them.
    """
    threads = torch.get_num_threads()
    best = _best_product(dtype)
    torch.set_num_threads(1)
    try:
        return max(best, _best_product(dtype))
    finally:
        torch.set_num_threads(threads)


def _best_product(dtype: torch.dtype) -> float:
    deadline = time.perf_counter() + MEASURE_SECONDS / 2
    best, size = 0.0, 256
    while time.perf_counter() < deadline:
        square = torch.ones(size, size, dtype=dtype)
        fastest = min(timeit.repeat(partial(torch.mm, square, square), number=1, repeat=REPEATS))
        best = max(best, 2 * size**3 / fastest)
        if time.perf_counter() + 8 * fastest * (REPEATS + 1) < deadline:
            size *= 2
    return best
