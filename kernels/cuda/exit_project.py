"""The CUDA kernel of ``exit_project``: a block takes a few rows through both projections and the norm.

The head's output waits for its norm in the rows that it is written to; every thread reads back what it wrote itself.
"""

from __future__ import annotations

import functools

import torch
from numba import cuda, float32
from torch import Tensor

from tide_kernels.cuda.activations import reciprocal_root
from tide_kernels.cuda.elements import elements, is_aligned
from tide_kernels.cuda.kernel import FLOAT, INT, Kernel, pointer
from tide_kernels.cuda.launches import EXIT_ROWS, EXIT_THREADS
from tide_kernels.cuda.reductions import WARP, block_sum
from tide_kernels.exit_project import LowRankWeights
from tide_kernels.route import Normalisation

CHUNK = 64
"""Channels of a block's rows that lie in shared memory at a time."""


def exit_project_cuda(states: Tensor, head: LowRankWeights, norm: Normalisation, out: Tensor, slots: Tensor) -> None:
    """``exit_project`` for checked arguments on a GPU."""
    num_rows, width = states.shape
    up, bias = head.up.contiguous(), head.bias.contiguous()
    vectors = [part.contiguous() if part is not None else bias for part in (norm.weight, norm.bias)]
    is_vector = width % elements(states.dtype).lanes == 0 and is_aligned(up, bias, out, *vectors)
    traits = norm.kind, norm.weight is not None, norm.bias is not None
    project_kernel(states.dtype, head.rank, *traits, is_vector=is_vector).launch(
        (-(-num_rows // EXIT_ROWS),),
        EXIT_THREADS,
        states.contiguous(),
        head.down.contiguous(),
        up,
        bias,
        *vectors,
        out,
        slots.contiguous(),
        num_rows,
        width,
        norm.eps,
    )


@functools.cache
def project_kernel(
    dtype: torch.dtype, rank: int, kind: str, has_weight: bool, has_bias: bool, *, is_vector: bool
) -> Kernel:
    """The kernel for one dtype, rank and norm."""
    numbers = elements(dtype, is_vector=is_vector)
    lanes, load, rounded = numbers.lanes, numbers.load, numbers.rounded
    load_vector, store_vector = numbers.load_vector, numbers.store_vector
    is_normed, is_centred = kind != "none", kind == "layer"
    rows, chunk, threads = EXIT_ROWS, CHUNK, EXIT_THREADS
    parts = threads // rank  # of a chunk's channels, each summed by ``rank`` threads
    tile, hidden_numbers, part_numbers = rows * chunk, rows * rank, parts * rows * rank
    outputs, warps = rows * lanes, threads // WARP

    @cuda.jit(device=True)
    def project_down(states, down, first, num_rows, width, x, partial, hidden):  # type: ignore[no-untyped-def]
        """``hidden[r * rank + unit]``, rounded as a linear layer's output."""
        total = cuda.local.array(rows, float32)
        thread = cuda.threadIdx.x
        unit, part = thread % rank, thread // rank
        for r in range(rows):
            total[r] = float32(0)
        for start in range(0, width, chunk):
            cuda.syncthreads()
            for i in range(thread, tile, threads):
                r, channel = i // chunk, start + i % chunk
                value = float32(0)
                if first + r < num_rows and channel < width:
                    value = load(states, (first + r) * width + channel)
                x[i % chunk * rows + r] = value
            cuda.syncthreads()
            if part < parts:
                for k in range(part, min(chunk, width - start), parts):
                    weight = load(down, (start + k) * rank + unit)
                    for r in range(rows):
                        total[r] += weight * x[k * rows + r]
        if part < parts:
            for r in range(rows):
                partial[(part * rows + r) * rank + unit] = total[r]
        cuda.syncthreads()
        for i in range(thread, hidden_numbers, threads):
            value = float32(0)
            for p in range(parts):
                value += partial[p * hidden_numbers + i]
            hidden[i] = rounded(value)
        cuda.syncthreads()

    @cuda.jit(device=True)
    def normalise(out, start, norm_weight, norm_bias, width, mean, factor, values, other):  # type: ignore[no-untyped-def]
        for i in range(cuda.threadIdx.x * lanes, width, threads * lanes):
            load_vector(out, start + i, values)
            for k in range(lanes):
                values[k] = rounded((values[k] - mean) * factor)
            if has_weight:
                load_vector(norm_weight, i, other)
                for k in range(lanes):
                    values[k] = rounded(values[k] * other[k])
            if has_bias:
                load_vector(norm_bias, i, other)
                for k in range(lanes):
                    values[k] = rounded(values[k] + other[k])
            store_vector(out, start + i, values)

    def project(  # type: ignore[no-untyped-def]
        states, down, up, bias, norm_weight, norm_bias, out, slots, num_rows, width, eps
    ):
        x = cuda.shared.array(tile, float32)
        partial = cuda.shared.array(part_numbers, float32)
        hidden = cuda.shared.array(hidden_numbers, float32)
        scratch = cuda.shared.array(warps, float32)
        sums = cuda.local.array(rows, float32)
        squares = cuda.local.array(rows, float32)
        total = cuda.local.array(outputs, float32)
        values = cuda.local.array(lanes, float32)
        other = cuda.local.array(lanes, float32)
        first, thread = cuda.blockIdx.x * rows, cuda.threadIdx.x
        project_down(states, down, first, num_rows, width, x, partial, hidden)
        for r in range(rows):
            sums[r], squares[r] = float32(0), float32(0)
        for channel in range(thread * lanes, width, threads * lanes):
            for i in range(outputs):
                total[i] = float32(0)
            for unit in range(rank):
                load_vector(up, unit * width + channel, other)
                for r in range(rows):
                    for k in range(lanes):
                        total[r * lanes + k] += hidden[r * rank + unit] * other[k]
            load_vector(bias, channel, other)
            for r in range(rows):
                if first + r < num_rows:
                    for k in range(lanes):
                        values[k] = rounded(total[r * lanes + k] + other[k])
                        sums[r] += values[k]
                        squares[r] += values[k] * values[k]
                    store_vector(out, slots[first + r] * width + channel, values)
        if is_normed:
            for r in range(rows):
                row = min(first + r, num_rows - 1)
                start = slots[row] * width
                mean, square = float32(0), squares[r]
                if is_centred:
                    mean = block_sum(sums[r], scratch) / float32(width)
                    square = float32(0)
                    if first + r < num_rows:
                        for i in range(thread * lanes, width, threads * lanes):
                            load_vector(out, start + i, values)
                            for k in range(lanes):
                                square += (values[k] - mean) * (values[k] - mean)
                factor = reciprocal_root(block_sum(square, scratch) / float32(width) + eps)
                if first + r < num_rows:
                    normalise(out, start, norm_weight, norm_bias, width, mean, factor, values, other)

    cells = pointer(dtype)
    tensors = *[cells] * 7, pointer(torch.int64)
    return Kernel(project, *tensors, INT, INT, FLOAT, max_threads=threads)
