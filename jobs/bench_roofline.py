"""What this machine allows a decode step at full depth: reading every weight once, and computing every row's products.

Attention, and whatever lies between the products, comes on top (after Williams et al. 2009,
doi:10.1145/1498765.1498785). A copy also loads the lines that it writes, on some machines, so pure reads may be faster
than the rate used here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tide_ray.models import LoadedModel
from tide_ray.models.packed_linear import PackedLinear, can_pack

COPIED_BYTES = 1 << 28
GEMM_SIZES = {"cpu": (1024, 2048), "cuda": (8192, 8192)}
"""Rows and width of the product that tells a device's rate."""
REPEATS = 7


def roofline(loaded: LoadedModel, batch_sizes: list[int], *, kv_bytes: int = 0) -> dict[str, Any]:
    """Weight bytes, measured rates, and ``tokens_per_second`` by batch size.

    Args:
        loaded: before an engine has packed its weights.
        kv_bytes: of the K/V that a row attends to; without, attention comes on top.
    """
    weights = sum(module.weight.numel() for module in loaded.model.modules() if isinstance(module, nn.Linear | Conv1D))
    num_bytes = weights * loaded.dtype.itemsize
    bandwidth, flops = copy_bandwidth(loaded.device), gemm_rate(loaded.device, loaded.dtype)
    return {
        "weight_bytes": num_bytes,
        "copy_bytes_per_second": round(bandwidth),
        "gemm_flops_per_second": round(flops),
        "tokens_per_second": {
            str(size): round(size / max((num_bytes + size * kv_bytes) / bandwidth, 2 * weights * size / flops), 1)
            for size in batch_sizes
        },
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written per second, copying far more than the caches hold."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / _median_seconds(lambda: target.copy_(source), device)


@torch.inference_mode()
def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one large product, its weight laid out as the engine's are."""
    num_rows, width = GEMM_SIZES[device.type]
    linear = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
    product: nn.Module = PackedLinear(linear) if can_pack(device, dtype) else linear
    rows = torch.randn(num_rows, width, device=device, dtype=dtype)  # a GPU computes faster on constants
    return 2 * num_rows * width**2 / _median_seconds(lambda: product(rows), device)


def _median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first one warms up
