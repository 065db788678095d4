"""The CUDA kernel of paged attention in 16-bit floats: scores and weighted sums are products on tensor cores.

A block takes one K/V head of one sequence and the up to eight queries that read it, a warp 16 tokens at a time. Scores
are ``Q K^T``, whose rows are queries; they come out as the operand that ``V^T P^T`` needs, so that no number changes
lanes (Dao 2023, arXiv 2307.08691, does so for ``P V``). The order of a head's channels in the first product is free, as
long as Q and K agree: each lane multiplies the eight that it reads at once. Running maxima and sums are float32.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from numba import cuda, float32, uint32

from tide_kernels.cuda.attention_merge import NOTHING, merge_in_block, share, work_of_block
from tide_kernels.cuda.elements import load_words
from tide_kernels.cuda.kernel import FLOAT, INT, IS_SIMULATED, LONG, Kernel, pointer
from tide_kernels.cuda.launches import ATTENTION_WARPS
from tide_kernels.cuda.reductions import ALL_LANES, WARP
from tide_kernels.cuda.tensor_cores import OLDEST, high_halves, low_halves, tensor_cores

TILE = 16
"""Tokens that a warp reads at once; a page holds whole tiles."""
WIDTHS = (64, 128)
"""Heads whose sums fit into registers."""


def takes_products(device: torch.device, dtype: torch.dtype, head_dim: int, page_size: int) -> bool:
    """Whether this kernel takes such heads and pages on a device."""
    fits = dtype != torch.float32 and head_dim in WIDTHS and page_size % TILE == 0
    return fits and (IS_SIMULATED or torch.cuda.get_device_capability(device) >= OLDEST)


@functools.cache
def product_kernel(
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    rows: int,
    page_size: int,
    has_softcap: bool,
    *,
    is_extend: bool,
    is_split: bool,
) -> Kernel:
    """The kernel for one shape: ``heads`` and ``rows`` as ``queries_of_block`` gives them, eight together at most.

    ``is_extend``: sequences have the rows that ``row_starts`` says; otherwise one each.
    """
    product, pair = tensor_cores(dtype)
    queries = heads * rows
    many_rows = rows > 1
    key_blocks, value_blocks = head_dim // 32, head_dim // 64
    num_words, num_sums = 4 * key_blocks, head_dim // 4
    step, threads = ATTENTION_WARPS * TILE, ATTENTION_WARPS * WARP
    peaks, all_numbers = ATTENTION_WARPS * queries, ATTENTION_WARPS * queries * head_dim
    rows_here, tokens_here = work_of_block(rows, is_extend=is_extend)
    merge = merge_in_block(dtype, ATTENTION_WARPS, heads, rows, head_dim, threads, is_split=is_split)

    @cuda.jit(device=True)
    def read(cells, at, is_there, words, first):  # type: ignore[no-untyped-def]
        """Eight numbers as four words, to ``words`` from the ``first`` on; zeros where nothing is."""
        if is_there:
            words[first], words[first + 1], words[first + 2], words[first + 3] = load_words(cells, at)
        else:
            for k in range(4):
                words[first + k] = uint32(0)

    def attend(  # type: ignore[no-untyped-def]
        query,
        key_pages,
        value_pages,
        page_table,
        row_starts,
        lengths,
        out,
        sums,
        maxima,
        num_rows,
        num_heads,
        kv_heads,
        table_width,
        row_tiles,
        row_stride,
        head_stride,
        window,
        scale,
        softcap,
    ):
        merged = cuda.shared.array(all_numbers, float32)
        peak_of = cuda.shared.array(peaks, float32)
        total_of = cuda.shared.array(peaks, float32)
        asked = cuda.local.array(num_words, uint32)
        key = cuda.local.array(num_words, uint32)
        even = cuda.local.array(4, uint32)
        odd = cuda.local.array(4, uint32)
        far_even = cuda.local.array(4, uint32)
        far_odd = cuda.local.array(4, uint32)
        acc = cuda.local.array(num_sums, float32)
        score = cuda.local.array(4, float32)
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        mine, part = lane // 4, lane % 4  # the query, or token, or channel of this lane, and its place in a row
        sequence = cuda.blockIdx.x // row_tiles
        kv_head, tile = cuda.blockIdx.y % kv_heads, cuda.blockIdx.y // kv_heads
        group = num_heads // kv_heads
        first, last = rows_here(row_starts, sequence, row_tiles)
        if first >= last:
            return
        begin, end = tokens_here(lengths, first, last, window)
        row, head = first + mine // heads, tile * heads + mine % heads
        is_query = mine < queries and row < last and head < group
        place = row * row_stride + (kv_head * group + head) * head_stride if is_query else 0
        for b in range(key_blocks):
            read(query, place + b * 32 + part * 8, is_query, asked, 4 * b)
        first_seen, last_seen = begin, end
        if many_rows and is_query:
            length = lengths[row]
            last_seen = min(end, length)
            if window > 0:
                first_seen = max(begin, length - window)
        for k in range(num_sums):
            acc[k] = float32(0)
        peak, total = NOTHING, float32(0)
        for base in range(begin // TILE * TILE + warp * TILE, end, step):
            page = page_table[sequence * table_width + base // page_size]
            start = (page * kv_heads + kv_head) * page_size + base % page_size
            for half in range(2):
                c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
                at = (start + half * 8 + mine) * head_dim + part * 8
                for b in range(key_blocks):
                    read(key_pages, at + b * 32, True, key, 4 * b)
                for b in range(key_blocks):
                    for s in range(2):
                        i = 4 * b + 2 * s
                        none = uint32(0)
                        c0, c1, c2, c3 = product(asked[i], none, asked[i + 1], none, key[i], key[i + 1], c0, c1, c2, c3)
                score[2 * half], score[2 * half + 1] = c0, c1
            highest = peak
            for k in range(4):
                token = base + k // 2 * 8 + part * 2 + k % 2
                logit = score[k] * scale
                if has_softcap:
                    logit = softcap * math.tanh(logit / softcap)
                if token < first_seen or token >= last_seen:
                    logit = NOTHING
                score[k] = logit
                if logit > highest:
                    highest = logit
            for far in (1, 2):
                other = cuda.shfl_xor_sync(ALL_LANES, highest, far)
                if other > highest:
                    highest = other
            fading = share(peak, highest)
            peak = highest
            total *= fading
            for k in range(4):
                score[k] = share(score[k], highest)
                total += score[k]
            near, beyond = pair(score[0], score[1]), pair(score[2], score[3])
            fading_even = cuda.shfl_sync(ALL_LANES, fading, 8 * part)
            fading_odd = cuda.shfl_sync(ALL_LANES, fading, 8 * part + 4)
            token = base + 2 * part
            at = (start + 2 * part) * head_dim + mine * 8
            for b in range(value_blocks):
                read(value_pages, at + b * 64, token < end, even, 0)
                read(value_pages, at + b * 64 + head_dim, token + 1 < end, odd, 0)
                read(value_pages, at + b * 64 + 8 * head_dim, token + 8 < end, far_even, 0)
                read(value_pages, at + b * 64 + 9 * head_dim, token + 9 < end, far_odd, 0)
                for j in range(4):
                    i = 4 * (4 * b + j)
                    acc[i], acc[i + 1], acc[i + 2], acc[i + 3] = product(
                        low_halves(even[j], odd[j]),
                        high_halves(even[j], odd[j]),
                        low_halves(far_even[j], far_odd[j]),
                        high_halves(far_even[j], far_odd[j]),
                        near,
                        beyond,
                        acc[i] * fading_even,
                        acc[i + 1] * fading_odd,
                        acc[i + 2] * fading_even,
                        acc[i + 3] * fading_odd,
                    )
        for far in (1, 2):
            total += cuda.shfl_xor_sync(ALL_LANES, total, far)
        if part == 0 and mine < queries:
            peak_of[warp * queries + mine], total_of[warp * queries + mine] = peak, total
        for k in range(num_sums):
            # Sum k of a lane: channels by pairs of eight that it read of V, and two queries.
            i, column = 2 * part + k % 2, k // 16 * 64 + mine * 8 + k // 4 % 4 * 2 + k // 2 % 2
            if i < queries:
                merged[(warp * queries + i) * head_dim + column] = acc[k]
        cuda.syncthreads()
        merge(
            merged, peak_of, total_of, out, sums, maxima,
            first, last, tile * heads, kv_head * group, group, num_rows, num_heads,
        )  # fmt: skip

    cells, wide, ints = pointer(dtype), pointer(torch.float32), pointer(torch.int32)
    inputs: tuple[Any, ...] = cells, cells, cells, ints, ints, ints
    scalars = *[INT] * 5, LONG, LONG, INT, FLOAT, FLOAT
    return Kernel(attend, *inputs, cells, wide, wide, *scalars, max_threads=threads, oldest=OLDEST)
