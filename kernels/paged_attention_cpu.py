"""Decode attention over paged K/V on a CPU, in Numba: streams each page once, float32 accumulation.

Threads come from Numba's OpenMP layer, which shares torch's OpenMP runtime (one pool, so the two never compete for
cores). bfloat16 is read and written as 16-bit patterns. Work is split by (row, K/V head).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import config, float32, njit, prange
from torch import Tensor

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]

# Reassociation and contraction let the compiler vectorise sums; infinities and NaN keep their meaning.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}

# exp(x) = 2^n * exp(r): Cephes' single-precision constants and polynomial (expf.c), good to 2 ulp.
LOG2_E = np.float32(1.44269504088896341)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
P0, P1, P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
P3, P4, P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
ONE, HALF, SMALLEST = np.float32(1.0), np.float32(0.5), np.float32(-87.0)


@njit(inline="always")
def _exp_nonpositive(x):  # type: ignore[no-untyped-def]
    """exp for x <= 0, branch-free so that loops over it vectorise; below -87 it gives exp(-87), about 1e-38."""
    x = max(x, SMALLEST)
    n = np.int32(x * LOG2_E - HALF)
    z = np.float32(n)
    x = x - z * LN2_HIGH - z * LN2_LOW
    y = ((((P0 * x + P1) * x + P2) * x + P3) * x + P4) * x + P5
    y = y * x * x + x + ONE
    return y * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def _load_float32(cell):  # type: ignore[no-untyped-def]
    return cell


@njit(inline="always")
def _load_bfloat16(cell):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(cell) << np.uint32(16)).view(np.float32)


@functools.cache
def _kernel(head_dim: int, is_bfloat16: bool) -> Callable[..., None]:
    """The kernel for one head width and element type (compiled at the first call, a few seconds)."""
    load = _load_bfloat16 if is_bfloat16 else _load_float32

    @njit(fastmath=FAST_MATH, error_model="numpy", boundscheck=False)
    def attend_one(query, keys, values, out, pages, kv_head, begin, end, scale, softcap):  # type: ignore[no-untyped-def]
        page_size = keys.shape[2]
        group = query.shape[0] // keys.shape[1]
        first, last = begin // page_size, (end + page_size - 1) // page_size
        base = first * page_size
        scores = np.empty((group, last * page_size - base), np.float32)
        rows = np.empty((page_size, head_dim), np.float32)
        scaled = np.empty((group, head_dim), np.float32)
        total = np.zeros((group, head_dim), np.float32)
        for g in range(group):
            for d in range(head_dim):
                scaled[g, d] = load(query[kv_head * group + g, d]) * scale
        for p in range(first, last):
            page = keys[pages[p], kv_head]
            low = max(begin - p * page_size, 0)
            high = min(page_size, end - p * page_size)
            shift = p * page_size - base
            for j in range(low, high):
                for d in range(head_dim):
                    rows[j, d] = load(page[j, d])
            for g in range(group):
                for j in range(low, high):
                    dot = float32(0)
                    for d in range(head_dim):
                        dot += scaled[g, d] * rows[j, d]
                    scores[g, shift + j] = dot
        low, high = begin - base, end - base
        for g in range(group):
            row = scores[g]
            if softcap > 0:
                for t in range(low, high):
                    row[t] = softcap * np.tanh(row[t] / softcap)
            top = row[low]
            for t in range(low, high):
                top = max(top, row[t])
            norm = float32(0)
            for t in range(low, high):
                weight = _exp_nonpositive(row[t] - top)
                row[t] = weight
                norm += weight
            inverse = float32(1) / norm
            for t in range(low, high):
                row[t] *= inverse
        for p in range(first, last):
            page = values[pages[p], kv_head]
            low = max(begin - p * page_size, 0)
            high = min(page_size, end - p * page_size)
            shift = p * page_size - base
            for j in range(low, high):
                for d in range(head_dim):
                    rows[j, d] = load(page[j, d])
            for g in range(group):
                row = total[g]
                for j in range(low, high):
                    weight = scores[g, shift + j]
                    for d in range(head_dim):
                        row[d] += weight * rows[j, d]
        for g in range(group):
            for d in range(head_dim):
                out[kv_head * group + g, d] = total[g, d]

    @njit(parallel=True, nogil=True, fastmath=FAST_MATH)
    def attend_all(query, keys, values, out, table, lengths, scale, softcap, window):  # type: ignore[no-untyped-def]
        kv_heads = keys.shape[1]
        for task in prange(query.shape[0] * kv_heads):
            row, kv_head = task // kv_heads, task % kv_heads
            end = lengths[row]
            begin = max(0, end - window) if window > 0 else 0
            attend_one(query[row], keys, values, out[row], table[row], kv_head, begin, end, scale, softcap)

    return attend_all


def cpu_kernel_takes(query: Tensor) -> bool:
    """Whether this kernel covers the query's device and dtype."""
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)


def _as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def cpu_decode_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """``paged_decode_attention`` for what ``cpu_kernel_takes``; same arguments and result."""
    out = torch.empty(query.shape, dtype=torch.float32)
    kernel = _kernel(query.shape[2], query.dtype == torch.bfloat16)
    num_threads = torch.get_num_threads()
    numba.set_num_threads(max(1, min(num_threads, config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    kernel(
        _as_numpy(query),
        _as_numpy(key_pages),
        _as_numpy(value_pages),
        out.numpy(),
        _as_numpy(page_table),
        _as_numpy(lengths),
        np.float32(scale),
        np.float32(softcap),
        window,
    )
    if torch.get_num_threads() != num_threads:  # Numba's first launch sets the process' OpenMP default to all cores
        torch.set_num_threads(num_threads)
    return out.to(query.dtype)
