"""Decode attention over paged K/V on a CPU, in Numba: streams each page once, float32 accumulation.

bfloat16 is read and rounded as 16-bit patterns. Work is split by (row, K/V head).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from numba import float32, prange
from torch import Tensor

from tide_kernels.attention_vectors import (
    add_weighted_tokens,
    exponentiate,
    raise_to,
    rows_for,
    scale_queries,
    score_tokens,
    store_scaled,
    tokens_for,
)
from tide_kernels.cpu import KERNEL_DTYPES, jit, launch, with_whole_heads
from tide_kernels.vectors import int32_at

# Reassociation and contraction let the compiler vectorise sums; infinities and NaN keep their meaning.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}


@functools.cache
def attend_kernel(head_dim: int, group: int, page_size: int, item_bytes: int) -> Callable[..., None]:
    """The kernel over addresses for one shape and element size.

    Compiled at the first call, a few seconds, and kept on disk.
    """
    rows, block = rows_for(group), tokens_for(page_size)
    row_bytes = head_dim * item_bytes
    page_bytes = page_size * row_bytes
    query_bytes, head_bytes = 4 * head_dim, item_bytes * head_dim

    @jit(fastmath=FAST_MATH, error_model="numpy", boundscheck=False)
    def attend_one(  # type: ignore[no-untyped-def]
        query, key_pool, value_pool, out, pages, kv_heads, kv_head, begin, end, later, scale, softcap
    ):
        queries = np.empty((group, head_dim), np.float32)
        for g in range(group):
            scale_queries(query + g * head_bytes, queries.ctypes.data + g * query_bytes, scale, head_dim, item_bytes)
        scores = np.empty((group, page_size), np.float32)
        maxima = np.empty(block, np.float32)
        tops = np.full(group, -np.inf, np.float32)
        norms = np.zeros((group, block), np.float32)
        total = np.zeros((group, head_dim), np.float32)
        first, last = begin // page_size, (end + page_size - 1) // page_size
        for p in range(first, last):
            at = (int32_at(pages, p) * kv_heads + kv_head) * page_bytes
            # Pages lie anywhere, so the hardware does not foresee the next one.
            ahead = (int32_at(pages, p + 1) * kv_heads + kv_head if p + 1 < last else later) * page_bytes
            low, high = max(begin - p * page_size, 0), min(page_size, end - p * page_size)
            aligned, padded = low // block * block, (high + block - 1) // block * block
            # Whole blocks are scored: a page is there to its end, and what lies past the sequence's is not looked at.
            for t in range(aligned, padded, block):
                for g in range(0, group, rows):
                    score_tokens(
                        queries.ctypes.data + g * query_bytes,
                        key_pool + at + t * row_bytes,
                        key_pool + ahead + t * row_bytes,
                        scores.ctypes.data + (g * page_size + t) * 4,
                        page_size * 4,
                        head_dim,
                        rows,
                        block,
                        item_bytes,
                    )
            for g in range(group):
                row, top = scores[g], tops[g]
                address = scores.ctypes.data + g * page_size * 4
                if softcap > 0:
                    for t in range(low, high):
                        row[t] = softcap * np.tanh(row[t] / softcap)
                for t in range(aligned, low):  # before the window
                    row[t] = -np.inf
                for t in range(high, padded):
                    row[t] = -np.inf
                for lane in range(block):
                    maxima[lane] = top
                for t in range(aligned, padded, block):
                    raise_to(maxima.ctypes.data, address + t * 4, block)
                for lane in range(block):
                    top = max(top, maxima[lane])
                if top > tops[g]:  # the sums so far were relative to the old top
                    factor = np.exp(tops[g] - top)
                    tops[g] = top
                    for lane in range(block):
                        norms[g, lane] *= factor
                    for d in range(head_dim):
                        total[g, d] *= factor
                norm_address, top_address = norms.ctypes.data + g * block * 4, tops.ctypes.data + g * 4
                for t in range(aligned, padded, block):
                    exponentiate(address + t * 4, norm_address, top_address, block)
                for t in range(aligned, low):
                    row[t] = 0
            whole = high // block * block  # past it, what the page holds may be anything, even NaN
            for t in range(aligned, whole, block):
                for g in range(0, group, rows):
                    sums, weights = total.ctypes.data + g * query_bytes, scores.ctypes.data + (g * page_size + t) * 4
                    value, then = value_pool + at + t * row_bytes, value_pool + ahead + t * row_bytes
                    add_weighted_tokens(sums, value, then, weights, page_size * 4, head_dim, rows, block, item_bytes)
            for t in range(max(aligned, whole), high):
                for g in range(0, group, rows):
                    sums, weights = total.ctypes.data + g * query_bytes, scores.ctypes.data + (g * page_size + t) * 4
                    value, then = value_pool + at + t * row_bytes, value_pool + ahead + t * row_bytes
                    add_weighted_tokens(sums, value, then, weights, page_size * 4, head_dim, rows, 1, item_bytes)
        for g in range(group):
            inverse = float32(1) / norms[g].sum()
            store_scaled(total.ctypes.data + g * query_bytes, out + g * head_bytes, inverse, head_dim, item_bytes)

    @jit(parallel=True, nogil=True, fastmath=FAST_MATH)
    def attend_all(  # type: ignore[no-untyped-def]
        query, row_step, keys, values, out, table, table_width, lengths, num_rows, kv_heads, scale, softcap, window
    ):
        num_tasks = num_rows * kv_heads
        out_step, group_bytes = kv_heads * group * head_bytes, group * head_bytes
        for task in prange(num_tasks):
            row, kv_head = task // kv_heads, task % kv_heads
            end = int32_at(lengths, row)
            begin = max(0, end - window) if window > 0 else 0
            next_row, next_head = min(task + 1, num_tasks - 1) // kv_heads, (task + 1) % kv_heads
            next_end = int32_at(lengths, next_row)
            next_page = (next_end - window) // page_size if window > 0 and next_end > window else 0
            later = int32_at(table, next_row * table_width + next_page) * kv_heads + next_head
            attend_one(
                query + row * row_step + kv_head * group_bytes,
                keys,
                values,
                out + row * out_step + kv_head * group_bytes,
                table + row * table_width * 4,
                kv_heads,
                kv_head,
                begin,
                end,
                later,
                scale,
                softcap,
            )

    return attend_all


def cpu_kernel_takes(query: Tensor) -> bool:
    """Whether this kernel covers the query's device and dtype."""
    return query.device.type == "cpu" and query.dtype in KERNEL_DTYPES


def cpu_decode_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """``paged_decode_attention`` for what ``cpu_kernel_takes``; same arguments and result."""
    num_rows, num_heads, head_dim = query.shape
    _, kv_heads, page_size, _ = key_pages.shape
    query, out = with_whole_heads(query), query.new_empty(query.shape)
    key_pages, value_pages = key_pages.contiguous(), value_pages.contiguous()
    page_table, lengths = page_table.contiguous(), lengths.contiguous()
    size = query.element_size()
    launch(
        attend_kernel(head_dim, num_heads // kv_heads, page_size, size),
        query.data_ptr(),
        query.stride(0) * size,
        key_pages.data_ptr(),
        value_pages.data_ptr(),
        out.data_ptr(),
        page_table.data_ptr(),
        page_table.shape[1],
        lengths.data_ptr(),
        num_rows,
        kv_heads,
        np.float32(scale),
        np.float32(softcap),
        window,
    )
    return out
