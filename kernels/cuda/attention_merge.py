"""What the attention kernels share: which rows and tokens are a block's, and how what was found of a query's softmax in
several places becomes one, within a block and between blocks.

Each place gives the highest score that it saw, and, relative to that, its sum of weights and its weighted sum of values
(Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from numba import cuda, float32

from tide_kernels.cuda.activations import exp
from tide_kernels.cuda.elements import elements
from tide_kernels.cuda.kernel import INT, Kernel, pointer
from tide_kernels.cuda.launches import COMBINE_THREADS

NOTHING = float32(-math.inf)
"""The highest score where none was seen."""


@cuda.jit(device=True)
def share(mine, best):  # type: ignore[no-untyped-def]
    """What a score, or a running sum with the maximum ``mine``, counts beside the maximum ``best``."""
    return float32(0) if mine == NOTHING else exp(mine - best)


def work_of_block(rows: int, *, is_extend: bool) -> tuple[Any, Any]:
    """Two device functions: the first of a block's ``rows`` rows and the end of its sequence's, and the tokens that it
    attends to, its split of those that any of its rows sees."""

    @cuda.jit(device=True)
    def rows_here(row_starts, sequence, row_tiles):  # type: ignore[no-untyped-def]
        if is_extend:
            return row_starts[sequence] + cuda.blockIdx.x % row_tiles * rows, row_starts[sequence + 1]
        return sequence, sequence + 1

    @cuda.jit(device=True)
    def tokens_here(lengths, first, last, window):  # type: ignore[no-untyped-def]
        begin, end = lengths[first], lengths[min(first + rows, last) - 1]  # rows of a sequence see ever more
        begin = max(0, begin - window) if window > 0 else 0
        each = (end - begin + cuda.gridDim.z - 1) // cuda.gridDim.z
        begin += cuda.blockIdx.z * each
        return begin, min(end, begin + each)

    return rows_here, tokens_here


def merge_in_block(
    dtype: torch.dtype, readers: int, heads: int, rows: int, head_dim: int, threads: int, *, is_split: bool
) -> Any:
    """A device function that merges what a block's ``readers`` found of ``heads`` heads of ``rows`` rows and writes it.

    Its shared arrays are by reader, then by query; ``sums`` and ``maxima`` take what ``combine_kernel`` merges.
    """
    store = elements(dtype).store
    queries = heads * rows
    all_heads, everything = queries * head_dim, readers * queries

    @cuda.jit(device=True)
    def merge(  # type: ignore[no-untyped-def]
        merged, peak_of, total_of, out, sums, maxima,
        first, last, first_head, head_base, group, num_rows, num_heads,
    ):  # fmt: skip
        for j in range(cuda.threadIdx.x, all_heads, threads):
            i, channel = j // head_dim, j % head_dim
            row, head = first + i // heads, first_head + i % heads
            if row < last and head < group:
                best, weight, number = NOTHING, float32(0), float32(0)
                for found in range(i, everything, queries):
                    best = max(best, peak_of[found])
                for found in range(i, everything, queries):
                    counts = share(peak_of[found], best)
                    weight += total_of[found] * counts
                    number += merged[found * head_dim + channel] * counts
                place_out = row * num_heads + head_base + head
                if is_split:
                    slot = cuda.blockIdx.z * num_rows * num_heads + place_out
                    sums[slot * head_dim + channel] = number
                    if channel == 0:
                        maxima[slot] = best
                        maxima[cuda.gridDim.z * num_rows * num_heads + slot] = weight
                else:
                    store(out, place_out * head_dim + channel, number / weight)

    return merge


@functools.cache
def combine_kernel(dtype: torch.dtype) -> Kernel:
    """Merges what the splits of a sequence found, a block to each head of each row."""
    store = elements(dtype).store

    def combine(sums, maxima, out, num_slots, head_dim, splits):  # type: ignore[no-untyped-def]
        slot = cuda.blockIdx.x
        best = NOTHING
        for split in range(splits):
            best = max(best, maxima[split * num_slots + slot])
        for channel in range(cuda.threadIdx.x, head_dim, cuda.blockDim.x):
            weight, number = float32(0), float32(0)
            for split in range(splits):
                place = split * num_slots + slot
                peak, part = maxima[place], maxima[splits * num_slots + place]
                if part != float32(0):  # what is not a number has no peak, and counts
                    counts = share(peak, best)
                    weight += part * counts
                    number += sums[place * head_dim + channel] * counts
            store(out, slot * head_dim + channel, number / weight)

    wide = pointer(torch.float32)
    return Kernel(combine, wide, wide, pointer(dtype), INT, INT, INT, max_threads=COMBINE_THREADS)
