"""The CUDA kernels of ``partition``, ``gather_rows`` and ``scatter_rows``."""

from __future__ import annotations

import functools
import math

import torch
from numba import cuda, int32, uint32
from torch import Tensor

from tide_kernels.cuda.elements import VECTOR_BYTES, load_words, store_words
from tide_kernels.cuda.kernel import INT, Kernel, pointer
from tide_kernels.cuda.launches import MOVE_THREADS, PARTITION_THREADS
from tide_kernels.cuda.reductions import ALL_LANES, WARP

WORDS = {1: torch.uint8, 4: torch.int32, 8: torch.int64, VECTOR_BYTES: torch.int32}
"""What rows are moved as, by bytes."""


def partition_cuda(exits: Tensor) -> tuple[Tensor, Tensor]:
    """``partition`` on a GPU."""
    order = torch.empty(len(exits), dtype=torch.long, device=exits.device)
    counts = torch.empty(2, dtype=torch.int32, device=exits.device)
    partition_kernel(PARTITION_THREADS).launch((1,), PARTITION_THREADS, exits.contiguous(), order, counts, len(exits))
    return order, counts


def move_rows(source: Tensor, target: Tensor, index: Tensor, count: Tensor | None, *, is_gather: bool) -> None:
    """``target[i] = source[index[i]]``, or, without ``is_gather``, ``target[index[i]] = source[i]``."""
    row_bytes = math.prod(source.shape[1:]) * source.element_size()
    if row_bytes == 0:
        return
    size = max(size for size in WORDS if _fits(size, row_bytes, source, target))
    words = row_bytes // size
    blocks = -(-words // MOVE_THREADS)
    move_kernel(size, is_gather=is_gather, is_counted=count is not None).launch(
        (len(index), blocks),
        MOVE_THREADS if blocks > 1 else -(-words // WARP) * WARP,
        source.view(-1).view(WORDS[size]),
        target.view(-1).view(WORDS[size]),
        index.contiguous(),
        index if count is None else count,
        words,
    )


def _fits(size: int, row_bytes: int, *tensors: Tensor) -> bool:
    return row_bytes % size == 0 and all(tensor.data_ptr() % size == 0 for tensor in tensors)


@functools.cache
def partition_kernel(threads: int) -> Kernel:
    """One block goes over the rows twice, ``threads`` at a time: counts those that exit, then gives out places."""
    warps = threads // WARP

    @cuda.jit(device=True)
    def exits_before(is_exit, sums):  # type: ignore[no-untyped-def]
        """How many of the block's rows before this thread's exit, and how many in all."""
        lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
        votes = uint32(cuda.ballot_sync(ALL_LANES, is_exit))
        cuda.syncthreads()  # sums may still be read
        if lane == 0:
            sums[warp] = cuda.popc(votes)
        cuda.syncthreads()
        before, total = int32(cuda.popc(votes & uint32((uint32(1) << uint32(lane)) - uint32(1)))), int32(0)
        for other in range(warps):
            if other < warp:
                before += sums[other]
            total += sums[other]
        return before, total

    def part_rows(exits, order, counts, num_rows):  # type: ignore[no-untyped-def]
        sums = cuda.shared.array(warps, int32)
        thread = cuda.threadIdx.x
        num_exits = int32(0)
        for start in range(0, num_rows, threads):
            row = start + thread
            _, total = exits_before(row < num_rows and exits[row] != 0, sums)
            num_exits += total
        if thread == 0:
            counts[0], counts[1] = num_exits, num_rows - num_exits
        done = int32(0)  # rows before this chunk that exit
        for start in range(0, num_rows, threads):
            row = start + thread
            is_exit = row < num_rows and exits[row] != 0
            before, total = exits_before(is_exit, sums)
            if is_exit:
                order[done + before] = row
            elif row < num_rows:
                order[num_exits + (row - done - before)] = row
            done += total

    pointers = pointer(torch.bool), pointer(torch.int64), pointer(torch.int32)
    return Kernel(part_rows, *pointers, INT, max_threads=threads)


@functools.cache
def move_kernel(size: int, *, is_gather: bool, is_counted: bool) -> Kernel:
    """A block moves a row, or part of one, in words of ``size`` bytes."""
    is_vector = size == VECTOR_BYTES

    def move(source, target, index, count, words):  # type: ignore[no-untyped-def]
        row, word = cuda.blockIdx.x, cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if word >= words or (is_counted and row >= count[0]):
            return
        from_row = index[row] if is_gather else row
        to_row = row if is_gather else index[row]
        if is_vector:
            a, b, c, d = load_words(source, (from_row * words + word) * 4)
            store_words(target, (to_row * words + word) * 4, a, b, c, d)
        else:
            target[to_row * words + word] = source[from_row * words + word]

    cells, counted = pointer(WORDS[size]), pointer(torch.int32 if is_counted else torch.int64)
    return Kernel(move, cells, cells, pointer(torch.int64), counted, INT, max_threads=MOVE_THREADS)
