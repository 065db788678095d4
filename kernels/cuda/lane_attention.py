"""The CUDA kernel of paged attention without tensor cores: for float32, and for heads that those do not take.

A block takes one K/V head of one sequence and the few queries that read it: heads of the group, and of
several rows where a sequence has more than one. A token's K is read 16 bytes to a lane by just as many lanes as that
takes; the other lanes of the warp read the next tokens. Each such set of lanes keeps a running softmax of its own, and
all of them are merged at the end.
"""

from __future__ import annotations

import functools
import math

import torch
from numba import cuda, float32

from tide_kernels.cuda.attention_merge import NOTHING, merge_in_block, share, work_of_block
from tide_kernels.cuda.elements import elements
from tide_kernels.cuda.kernel import FLOAT, INT, LONG, Kernel, pointer
from tide_kernels.cuda.launches import ATTENTION_WARPS
from tide_kernels.cuda.reductions import ALL_LANES, WARP


@functools.cache
def attend_kernel(
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    rows: int,
    page_size: int,
    has_softcap: bool,
    *,
    is_extend: bool,
    is_split: bool,
    is_vector: bool,
) -> Kernel:
    """The kernel for one shape: ``heads`` and ``rows`` as ``queries_of_block`` gives them.

    ``is_extend``: sequences have the rows that ``row_starts`` says; otherwise one each.
    """
    numbers = elements(dtype, is_vector=is_vector)
    lanes, load_vector = numbers.lanes, numbers.load_vector
    vectors = -(-head_dim // lanes)  # of one head
    token_lanes = min(WARP, 1 << (vectors - 1).bit_length())  # that read one token together
    held = -(-vectors // token_lanes)  # vectors to a lane
    width = held * lanes
    tokens = WARP // token_lanes  # that a warp reads at once
    queries = heads * rows
    num_numbers, step = queries * width, ATTENTION_WARPS * tokens
    readers = ATTENTION_WARPS * tokens  # sets of lanes with a running softmax of their own
    threads, peaks, all_numbers = ATTENTION_WARPS * WARP, readers * queries, readers * queries * head_dim
    many_rows = rows > 1
    reach = tuple(2**k for k in range(5) if 2**k < token_lanes)[::-1] or (0,)
    rows_here, tokens_here = work_of_block(rows, is_extend=is_extend)
    merge = merge_in_block(dtype, readers, heads, rows, head_dim, threads, is_split=is_split)

    @cuda.jit(device=True)
    def read_head(cells, start, lane, values, vector):  # type: ignore[no-untyped-def]
        """This lane's numbers of one head; 0 past its end."""
        for v in range(held):
            index = v * token_lanes + lane
            if index < vectors:
                load_vector(cells, start + index * lanes, vector)
                for k in range(lanes):
                    values[v * lanes + k] = vector[k]
            else:
                for k in range(lanes):
                    values[v * lanes + k] = float32(0)

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
        q = cuda.local.array(num_numbers, float32)
        acc = cuda.local.array(num_numbers, float32)
        peak = cuda.local.array(queries, float32)
        total = cuda.local.array(queries, float32)
        key = cuda.local.array(width, float32)
        value = cuda.local.array(width, float32)
        vector = cuda.local.array(lanes, float32)
        warp, lane = cuda.threadIdx.x // WARP, cuda.threadIdx.x % WARP
        part, place = lane % token_lanes, lane // token_lanes
        sequence = cuda.blockIdx.x // row_tiles
        kv_head, tile = cuda.blockIdx.y % kv_heads, cuda.blockIdx.y // kv_heads
        group = num_heads // kv_heads
        first, last = rows_here(row_starts, sequence, row_tiles)
        if first >= last:
            return
        begin, end = tokens_here(lengths, first, last, window)
        for r in range(rows):
            for h in range(heads):
                i = r * heads + h
                row, head = min(first + r, last - 1), min(tile * heads + h, group - 1)
                read_head(query, row * row_stride + (kv_head * group + head) * head_stride, part, key, vector)
                for k in range(width):
                    q[i * width + k] = key[k] * scale
                    acc[i * width + k] = float32(0)
                peak[i], total[i] = NOTHING, float32(0)
        for base in range(begin + warp * tokens, end, step):
            token = base + place
            is_here = token < end
            at = 0
            if is_here:
                page = page_table[sequence * table_width + token // page_size]
                at = ((page * kv_heads + kv_head) * page_size + token % page_size) * head_dim
                read_head(key_pages, at, part, key, vector)
                read_head(value_pages, at, part, value, vector)
            for r in range(rows):
                is_seen = is_here
                if many_rows:
                    length = lengths[min(first + r, last - 1)]
                    is_seen = is_here and token < length and (window == 0 or token >= length - window)
                for h in range(heads):
                    i = r * heads + h
                    score = float32(0)
                    if is_here:
                        for k in range(width):
                            score += q[i * width + k] * key[k]
                    for far in reach:
                        if far > 0:
                            score += cuda.shfl_xor_sync(ALL_LANES, score, far)
                    if has_softcap:
                        score = softcap * math.tanh(score / softcap)
                    if is_seen:
                        weight = float32(1)
                        if score > peak[i]:
                            fading = share(peak[i], score)
                            peak[i] = score
                            total[i] *= fading
                            for k in range(width):
                                acc[i * width + k] *= fading
                        else:
                            weight = share(score, peak[i])  # a first score may be minus infinity
                        total[i] += weight
                        for k in range(width):
                            acc[i * width + k] += weight * value[k]
        reader = warp * tokens + place
        for i in range(queries):
            if part == 0:
                peak_of[reader * queries + i], total_of[reader * queries + i] = peak[i], total[i]
            for v in range(held):
                index = v * token_lanes + part
                if index < vectors:
                    for k in range(lanes):
                        slot = (reader * queries + i) * head_dim + index * lanes + k
                        merged[slot] = acc[i * width + v * lanes + k]
        cuda.syncthreads()
        merge(
            merged, peak_of, total_of, out, sums, maxima,
            first, last, tile * heads, kv_head * group, group, num_rows, num_heads,
        )  # fmt: skip

    cells, wide, ints = pointer(dtype), pointer(torch.float32), pointer(torch.int32)
    inputs = cells, cells, cells, ints, ints, ints
    scalars = *[INT] * 5, LONG, LONG, INT, FLOAT, FLOAT
    return Kernel(attend, *inputs, cells, wide, wide, *scalars, max_threads=threads)
