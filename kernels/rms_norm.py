"""RMS normalisation (arXiv 1910.07467) in one pass over memory instead of seven, alone or after an addition.

``rms_norm`` is a Numba kernel on a CPU and on a GPU; ``rms_norm_reference``, the same in torch, stands in on a GPU
without kernels: what transformers' models compute, with their two roundings, of the normalised row and of its product
with the weight. ``add_rms_norm`` also adds what a part of a layer computed to the residual stream, and returns both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.cpu import PARALLEL_FROM, is_for_kernels, jit, launch
from tide_kernels.layer_vectors import add_numbers, scale_twice, sum_of_squares
from tide_kernels.vectors import MAX_LANES


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * rows / sqrt(mean(rows ** 2) + eps)`` over the last dimension.

    Args:
        rows: float32 or bfloat16 ``[..., D]``, on a GPU also float16; on a CPU D is a multiple of 16.
        weight: ``[D]`` of the same dtype.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(rows, weight)
    if gpu.run_on(rows, weight):
        from tide_kernels.cuda.rms_norm import rms_norm_cuda

        return rms_norm_cuda(rows, weight, eps)
    if rows.device.type != "cpu":
        return rms_norm_reference(rows, weight, eps)
    rows, weight = rows.contiguous(), weight.contiguous()
    out = torch.empty_like(rows)
    _run(rows, 0, 0, weight, out, eps)
    return out


def add_rms_norm(rows: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``total = rows + update`` and ``rms_norm(total)``.

    Args:
        rows, weight: as in ``rms_norm``.
        update: like ``rows``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(rows, weight)
    if update.shape != rows.shape or update.dtype != rows.dtype or update.device != rows.device:
        raise ValueError(f"rows {tuple(rows.shape)} do not fit an update {tuple(update.shape)} in {update.dtype}")
    if gpu.run_on(rows, update, weight):
        from tide_kernels.cuda.rms_norm import add_rms_norm_cuda

        return add_rms_norm_cuda(rows, update, weight, eps)
    if rows.device.type != "cpu":
        return add_rms_norm_reference(rows, update, weight, eps)
    rows, update, weight = rows.contiguous(), update.contiguous(), weight.contiguous()
    total, out = torch.empty_like(rows), torch.empty_like(rows)
    _run(rows, update.data_ptr(), total.data_ptr(), weight, out, eps)
    return total, out


def rms_norm_reference(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in torch."""
    wide = rows.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(rows.dtype)


def add_rms_norm_reference(rows: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in torch."""
    total = rows + update
    return total, rms_norm_reference(total, weight, eps)


def _check(rows: Tensor, weight: Tensor) -> None:
    width = rows.shape[-1]
    fits = weight.shape == (width,) and weight.dtype == rows.dtype and weight.device == rows.device
    is_for_cpu = rows.device.type == "cpu" and not gpu.run_on(rows, weight)
    if not fits or (is_for_cpu and (width % MAX_LANES or not is_for_kernels(rows, weight))):
        raise ValueError(
            f"rows {tuple(rows.shape)} in {rows.dtype} do not fit a weight {tuple(weight.shape)} in {weight.dtype}, "
            f"or are not of {MAX_LANES} x n numbers"
        )


def _run(rows: Tensor, update: int, total: int, weight: Tensor, out: Tensor, eps: float) -> None:
    width = rows.shape[-1]
    sizes = rows.numel() // width, width, np.float32(eps)
    arguments = rows.data_ptr(), update, total, weight.data_ptr(), out.data_ptr(), *sizes
    launch(normalise(rows.element_size()), *arguments)


@functools.cache
def normalise(item_bytes: int) -> Callable[..., None]:
    """The kernel over addresses; an ``update`` of 0 adds nothing."""
    alone, together = (_normalise(item_bytes, is_parallel=is_parallel) for is_parallel in (False, True))

    @jit(nogil=True)
    def normalise_rows(rows, update, total, weight, out, num_rows, width, eps):  # type: ignore[no-untyped-def]
        if num_rows * width < PARALLEL_FROM:
            alone(rows, update, total, weight, out, num_rows, width, eps)
        else:
            together(rows, update, total, weight, out, num_rows, width, eps)

    return normalise_rows


def _normalise(item_bytes: int, *, is_parallel: bool) -> Callable[..., None]:
    @jit(parallel=is_parallel, nogil=True, boundscheck=False, error_model="numpy")
    def normalise_all(rows, update, total, weight, out, num_rows, width, eps):  # type: ignore[no-untyped-def]
        num_vectors = width // MAX_LANES
        for row in prange(num_rows):
            offset = row * width * item_bytes
            source = rows + offset
            if update != 0:
                add_numbers(source, update + offset, total + offset, num_vectors, item_bytes)
                source = total + offset
            mean = sum_of_squares(source, num_vectors, item_bytes) / np.float32(width)
            factor = np.float32(1) / np.float32(math.sqrt(mean + eps))
            scale_twice(source, weight, out + offset, num_vectors, factor, item_bytes)

    return normalise_all
