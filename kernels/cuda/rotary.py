"""The CUDA kernel of ``rotate``: a thread to as many channels of a head, and their partners, as 16 bytes hold."""

from __future__ import annotations

import functools

import torch
from numba import cuda, float32
from torch import Tensor

from tide_kernels.cuda.elements import elements, is_aligned
from tide_kernels.cuda.kernel import INT, LONG, Kernel, pointer
from tide_kernels.cuda.launches import ROTARY_THREADS


def rotate_cuda(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``rotate`` for checked arguments on a GPU."""
    num_rows, num_heads, width = heads.shape
    half, lanes = width // 2, elements(heads.dtype).lanes
    is_vector = half % lanes == 0 and heads.stride(0) % lanes == 0 and is_aligned(heads, cos, sin)
    vectors = half // lanes if is_vector else half
    items = num_rows * num_heads * vectors
    rotary_kernel(heads.dtype, is_vector=is_vector).launch(
        (-(-items // ROTARY_THREADS),), ROTARY_THREADS, heads, cos, sin, items, num_heads, vectors, heads.stride(0)
    )


@functools.cache
def rotary_kernel(dtype: torch.dtype, *, is_vector: bool) -> Kernel:
    """The kernel for heads whose halves are ``vectors`` vectors."""
    numbers = elements(dtype, is_vector=is_vector)
    lanes, rounded = numbers.lanes, numbers.rounded
    load_vector, store_vector = numbers.load_vector, numbers.store_vector

    def rotate_heads(heads, cos, sin, items, num_heads, vectors, row_stride):  # type: ignore[no-untyped-def]
        low = cuda.local.array(lanes, float32)
        high = cuda.local.array(lanes, float32)
        cosines = cuda.local.array(lanes, float32)
        sines = cuda.local.array(lanes, float32)
        item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if item >= items:
            return
        vector, head, row = item % vectors, item // vectors % num_heads, item // (vectors * num_heads)
        half = vectors * lanes
        first = row * row_stride + (2 * head * vectors + vector) * lanes
        table = (2 * row * vectors + vector) * lanes
        load_vector(heads, first, low)
        load_vector(heads, first + half, high)
        load_vector(cos, table, cosines)
        load_vector(sin, table, sines)
        for k in range(lanes):  # the tables' halves differ in models that scale them
            cosines[k], sines[k] = rounded(low[k] * cosines[k]), rounded(high[k] * sines[k])
            cosines[k] = cosines[k] - sines[k]
        store_vector(heads, first, cosines)
        load_vector(cos, table + half, cosines)
        load_vector(sin, table + half, sines)
        for k in range(lanes):
            high[k] = rounded(high[k] * cosines[k]) + rounded(low[k] * sines[k])
        store_vector(heads, first + half, high)

    cells = pointer(dtype)
    return Kernel(rotate_heads, cells, cells, cells, INT, INT, INT, LONG, max_threads=ROTARY_THREADS)
