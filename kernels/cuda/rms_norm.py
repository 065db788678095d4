"""The CUDA kernel of ``rms_norm`` and ``add_rms_norm``: a block to a row, which registers hold where the width is one
of SPECIALISED_WIDTHS, so that memory is read once."""

from __future__ import annotations

import functools

import torch
from numba import cuda, float32
from torch import Tensor

from tide_kernels.cuda.activations import reciprocal_root
from tide_kernels.cuda.elements import elements, is_aligned
from tide_kernels.cuda.kernel import FLOAT, INT, Kernel, pointer
from tide_kernels.cuda.launches import NORM_THREADS, SPECIALISED_WIDTHS, whole_warps
from tide_kernels.cuda.reductions import WARP, block_sum


def rms_norm_cuda(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` for checked arguments on a GPU."""
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    _launch(rows, None, None, weight, out, eps)
    return out


def add_rms_norm_cuda(rows: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` for checked arguments on a GPU."""
    rows = rows.contiguous()
    total, out = torch.empty_like(rows), torch.empty_like(rows)
    _launch(rows, update.contiguous(), total, weight, out, eps)
    return total, out


def _launch(rows: Tensor, update: Tensor | None, total: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    width, weight = rows.shape[-1], weight.contiguous()
    read = [rows, weight] if update is None else [rows, weight, update]
    fixed_width = width if width in SPECIALISED_WIDTHS and is_aligned(*read) else 0
    kernel = norm_kernel(rows.dtype, fixed_width, update is not None)
    extra = (rows, rows) if update is None or total is None else (update, total)
    blocks = rows.numel() // width if width else 0
    kernel.launch((blocks,), norm_threads(rows.dtype, fixed_width), rows, *extra, weight, out, width, eps)


def norm_threads(dtype: torch.dtype, fixed_width: int) -> int:
    """Threads that share a row: no more than there are vectors in it."""
    vectors = fixed_width // elements(dtype).lanes
    return min(NORM_THREADS, whole_warps(vectors)) if fixed_width else NORM_THREADS


@functools.cache
def norm_kernel(dtype: torch.dtype, fixed_width: int, has_update: bool) -> Kernel:
    """The kernel for one dtype and width; ``fixed_width`` 0 takes any width and reads rows twice."""
    is_fixed = fixed_width > 0
    numbers = elements(dtype, is_vector=is_fixed)
    lanes, rounded = numbers.lanes, numbers.rounded
    load_vector, store_vector = numbers.load_vector, numbers.store_vector
    threads = norm_threads(dtype, fixed_width)
    vectors = fixed_width // lanes
    held = -(-vectors // threads) if is_fixed else 1  # vectors of a row in each thread's registers
    held_numbers, warps = held * lanes, threads // WARP

    @cuda.jit(device=True)
    def read(rows, update, total, i, values, other):  # type: ignore[no-untyped-def]
        """``lanes`` numbers of the stream, the update added and what that gives kept in memory."""
        load_vector(rows, i, values)
        if has_update:
            load_vector(update, i, other)
            for k in range(lanes):
                values[k] = rounded(values[k] + other[k])
            store_vector(total, i, values)

    @cuda.jit(device=True)
    def write(out, weight, start, i, values, other, factor):  # type: ignore[no-untyped-def]
        load_vector(weight, i, other)
        for k in range(lanes):
            values[k] = rounded(values[k] * factor) * other[k]
        store_vector(out, start + i, values)

    def normalise_in_registers(rows, update, total, weight, out, _width, eps):  # type: ignore[no-untyped-def]
        scratch = cuda.shared.array(warps, float32)
        row = cuda.local.array(held_numbers, float32)
        values = cuda.local.array(lanes, float32)
        other = cuda.local.array(lanes, float32)
        start, thread = cuda.blockIdx.x * fixed_width, cuda.threadIdx.x
        squares = float32(0)
        for v in range(held):
            vector = v * threads + thread
            if vector < vectors:
                read(rows, update, total, start + vector * lanes, values, other)
                for k in range(lanes):
                    row[v * lanes + k] = values[k]
                    squares += values[k] * values[k]
        factor = reciprocal_root(block_sum(squares, scratch) / float32(fixed_width) + eps)
        for v in range(held):
            vector = v * threads + thread
            if vector < vectors:
                for k in range(lanes):
                    values[k] = row[v * lanes + k]
                write(out, weight, start, vector * lanes, values, other, factor)

    def normalise(rows, update, total, weight, out, width, eps):  # type: ignore[no-untyped-def]
        scratch = cuda.shared.array(warps, float32)
        values = cuda.local.array(lanes, float32)
        other = cuda.local.array(lanes, float32)
        start, thread = cuda.blockIdx.x * width, cuda.threadIdx.x
        squares = float32(0)
        for i in range(thread, width, threads):
            read(rows, update, total, start + i, values, other)
            squares += values[0] * values[0]
        factor = reciprocal_root(block_sum(squares, scratch) / float32(width) + eps)
        for i in range(thread, width, threads):  # each thread reads again what it has written itself
            if has_update:
                load_vector(total, start + i, values)
            else:
                load_vector(rows, start + i, values)
            write(out, weight, start, i, values, other, factor)

    cells = pointer(dtype)
    function = normalise_in_registers if is_fixed else normalise
    return Kernel(function, cells, cells, cells, cells, cells, INT, FLOAT, max_threads=threads)
