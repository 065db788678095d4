"""The CUDA kernel of ``silu_mul``."""

from __future__ import annotations

import functools

import torch
from numba import cuda, float32
from torch import Tensor

from tide_kernels.cuda.activations import silu
from tide_kernels.cuda.elements import elements, is_aligned
from tide_kernels.cuda.kernel import INT, Kernel, pointer
from tide_kernels.cuda.launches import SILU_THREADS


def silu_mul_cuda(rows: Tensor) -> Tensor:
    """``silu_mul`` for checked arguments on a GPU."""
    rows = rows.contiguous()
    width = rows.shape[-1] // 2
    out = rows.new_empty((*rows.shape[:-1], width))
    lanes = elements(rows.dtype).lanes
    is_vector = width % lanes == 0 and is_aligned(rows)
    vectors = width // lanes if is_vector else width
    num_rows = out.numel() // width if width else 0
    blocks = num_rows, -(-vectors // SILU_THREADS)
    silu_kernel(rows.dtype, is_vector=is_vector).launch(blocks, SILU_THREADS, rows, out, vectors)
    return out


@functools.cache
def silu_kernel(dtype: torch.dtype, *, is_vector: bool) -> Kernel:
    """The kernel for rows of ``2 * vectors`` vectors."""
    numbers = elements(dtype, is_vector=is_vector)
    lanes, rounded = numbers.lanes, numbers.rounded
    load_vector, store_vector = numbers.load_vector, numbers.store_vector

    def gate_rows(rows, out, vectors):  # type: ignore[no-untyped-def]
        gates = cuda.local.array(lanes, float32)
        values = cuda.local.array(lanes, float32)
        row, vector = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if vector < vectors:
            load_vector(rows, (2 * row * vectors + vector) * lanes, gates)
            load_vector(rows, ((2 * row + 1) * vectors + vector) * lanes, values)
            for k in range(lanes):
                values[k] = rounded(silu(gates[k])) * values[k]
            store_vector(out, (row * vectors + vector) * lanes, values)

    return Kernel(gate_rows, pointer(dtype), pointer(dtype), INT, max_threads=SILU_THREADS)
