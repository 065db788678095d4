"""Rotary positions (arXiv 2104.09864) in place: channel i turns with channel i + d / 2, as LLaMA's do.

``rotate`` is a Numba kernel on a CPU and on a GPU; ``rotate_reference`` is the same in torch, out of place: what
transformers' models compute, with their roundings of both products and of the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from numba import prange
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.cpu import PARALLEL_FROM, is_for_kernels, jit, launch
from tide_kernels.layer_vectors import turn_halves


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate rows of heads in place.

    Args:
        heads: float32 or bfloat16 ``[N, H, d]``, on a GPU also float16, d even; a row's heads lie one after another.
        cos, sin: contiguous ``[N, d]`` of the same dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit together.
    """
    num_rows, num_heads, width = heads.shape
    takes_gpu = gpu.run_on(heads, cos, sin)
    dtype_fits = takes_gpu or heads.device.type != "cpu" or is_for_kernels(heads, cos, sin)
    if cos.shape != (num_rows, width) or sin.shape != cos.shape or width % 2 or not dtype_fits:
        raise ValueError(f"heads {tuple(heads.shape)} in {heads.dtype} do not fit tables {tuple(cos.shape)}")
    if heads.stride()[1:] != (width, 1) or not cos.is_contiguous() or not sin.is_contiguous():
        raise ValueError("the heads of a row must lie one after another, and the tables must be contiguous")
    if takes_gpu:
        from tide_kernels.cuda.rotary import rotate_cuda

        rotate_cuda(heads, cos, sin)
        return
    if heads.device.type != "cpu":
        heads.copy_(rotate_reference(heads, cos, sin))
        return
    size = heads.element_size()
    arguments = heads.data_ptr(), heads.stride(0) * size, cos.data_ptr(), sin.data_ptr(), num_rows, num_heads
    launch(turn_rows(width // 2, size), *arguments)


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What ``rotate`` makes of the heads, in torch."""
    low, high = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


@functools.cache
def turn_rows(half: int, item_bytes: int) -> Callable[..., None]:
    """The kernel over addresses, for heads of ``2 * half`` channels."""
    alone, together = (_turn(half, item_bytes, is_parallel=is_parallel) for is_parallel in (False, True))

    @jit(nogil=True)
    def turn(heads, row_bytes, cos, sin, num_rows, num_heads):  # type: ignore[no-untyped-def]
        if num_rows * num_heads * 2 * half < PARALLEL_FROM:
            alone(heads, row_bytes, cos, sin, num_rows, num_heads)
        else:
            together(heads, row_bytes, cos, sin, num_rows, num_heads)

    return turn


def _turn(half: int, item_bytes: int, *, is_parallel: bool) -> Callable[..., None]:
    head_bytes = 2 * half * item_bytes

    @jit(parallel=is_parallel, nogil=True, boundscheck=False)
    def turn_all(heads, row_bytes, cos, sin, num_rows, num_heads):  # type: ignore[no-untyped-def]
        for row in prange(num_rows):
            table = row * head_bytes
            for head in range(num_heads):
                turn_halves(heads + row * row_bytes + head * head_bytes, cos + table, sin + table, half, item_bytes)

    return turn_all
