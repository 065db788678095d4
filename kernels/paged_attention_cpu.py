"""Decode attention over paged K/V on a CPU, in Numba: streams each page once, float32 accumulation.

bfloat16 is read and rounded as 16-bit patterns. Work is split by row, or by row and K/V head where rows are few; each
task scores all tokens that its query rows see, turns the scores into weights, and sums the values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import float32, prange
from torch import Tensor

from tide_kernels.attention_vectors import (
    MAX_TOKENS,
    PAIR_WIDTH,
    add_weighted_pairs,
    add_weighted_tokens,
    rows_for,
    score_pairs,
    score_tokens,
    softmax_weights,
    store_scaled,
    tokens_for,
)
from tide_kernels.cpu import KERNEL_DTYPES, jit, launch, with_whole_heads
from tide_kernels.task_sharing import new_ranges, share_out, take_task
from tide_kernels.vectors import MAX_LANES, has_pair_products, int32_at

MIN_ROWS, MAX_SCORES = 16, 2**17
# Reassociation and contraction let the compiler vectorise sums; infinities and NaN keep their meaning.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}


@functools.cache
def attend_kernel(head_dim: int, group: int, page_size: int, item_bytes: int) -> Callable[..., None]:
    """The kernel over addresses for one shape and element size.

    Compiled at the first call, a few seconds, and kept on disk.
    """
    rows, block = rows_for(group, head_dim), tokens_for(page_size)
    head_bytes, sum_bytes = item_bytes * head_dim, 4 * head_dim
    page_bytes = page_size * head_bytes
    is_paired = item_bytes == 2 and has_pair_products() and head_dim % PAIR_WIDTH == 0 and block == MAX_TOKENS
    score_block = score_pairs if is_paired else score_tokens
    add_block = _add_in_pairs(group, head_dim) if is_paired else _add_one_by_one(group, head_dim, block, item_bytes)
    weight_bytes = 2 if is_paired else 4

    @jit(fastmath=FAST_MATH, error_model="numpy", boundscheck=False)
    def attend_one(  # type: ignore[no-untyped-def]
        query, key_pool, value_pool, out, pages, kv_heads, first_head, num_here, begin, end, later, scale, softcap
    ):
        first, last = begin // page_size, (end + page_size - 1) // page_size
        base = first * page_size  # tokens are numbered from the first page's first one
        low, high = begin - base, end - base
        start = low // block * block
        num_vectors = (high - start + MAX_LANES - 1) // MAX_LANES
        padded = start + num_vectors * MAX_LANES
        num_queries = num_here * group
        scores = np.empty((num_queries, max(padded, (last - first) * page_size)), np.float32)
        total = np.zeros((num_queries, head_dim), np.float32)
        score_address, stride = scores.ctypes.data, scores.shape[1] * 4
        # Whole blocks are scored: a page is there to its end, and what lies past the sequence's is not looked at.
        for p in range(first, last):
            keys = key_pool + (int32_at(pages, p) * kv_heads + first_head) * page_bytes
            next_page = int32_at(pages, p + 1 if p + 1 < last else first) * kv_heads + first_head
            shift = (p - first) * page_size
            for h in range(num_here):
                # Pages may lie anywhere, so the hardware does not foresee the next one: of K, then the first of V.
                ahead = keys + page_bytes
                if h + 1 == num_here:
                    ahead = (key_pool if p + 1 < last else value_pool) + next_page * page_bytes
                for t in range(max(start - shift, 0), min(page_size, high - shift), block):
                    for g in range(0, group, rows):
                        number, place = h * group + g, t * head_bytes
                        scored = score_address + number * stride + (shift + t) * 4
                        asking = query + number * head_bytes
                        score_block(
                            asking, keys + place, ahead + place, scored, stride, head_dim, rows, block, item_bytes
                        )
                keys += page_bytes
        norms = np.empty(num_queries, np.float32)
        for g in range(num_queries):
            for t in range(start, low):  # before the window
                scores[g, t] = -np.inf
            for t in range(high, padded):
                scores[g, t] = -np.inf
            factor = scale
            if softcap > 0:
                factor = np.float32(1)
                for t in range(low, high):
                    scores[g, t] = softcap * np.tanh(scores[g, t] * scale / softcap)
            norms[g] = softmax_weights(score_address + g * stride + start * 4, num_vectors, factor, is_paired)
        for p in range(first, last):
            values = value_pool + (int32_at(pages, p) * kv_heads + first_head) * page_bytes
            next_page = int32_at(pages, p + 1) * kv_heads + first_head if p + 1 < last else later
            shift = (p - first) * page_size
            begins = max(start - shift, 0)
            for h in range(num_here):
                ahead = values + page_bytes
                if h + 1 == num_here:
                    ahead = (value_pool if p + 1 < last else key_pool) + next_page * page_bytes
                sums = total.ctypes.data + h * group * sum_bytes
                # By name and not by address, or Numba frees the scores after their last use by name above.
                weights = scores.ctypes.data + h * group * stride + start * 4 + (shift + begins - start) * weight_bytes
                add_block(values, ahead, sums, weights, stride, begins, min(page_size, high - shift))
                values += page_bytes
        for g in range(num_queries):
            inverse = float32(1) / norms[g]
            store_scaled(total.ctypes.data + g * sum_bytes, out + g * head_bytes, inverse, head_dim, item_bytes)

    @jit(parallel=True, nogil=True, fastmath=FAST_MATH)
    def attend_all(  # type: ignore[no-untyped-def]
        query, row_step, keys, values, out, table, table_width, lengths, num_rows, kv_heads, scale, softcap, window
    ):
        # K and V of a page's heads lie together, and are read together unless that leaves threads without work or the
        # scores of all heads leave the cache.
        is_whole = num_rows >= MIN_ROWS and kv_heads * group * table_width * page_size <= MAX_SCORES
        num_here = kv_heads if is_whole else 1
        parts = kv_heads // num_here
        num_tasks = num_rows * parts
        out_step, group_bytes = kv_heads * group * head_bytes, group * head_bytes
        ranges = new_ranges()
        num_workers = share_out(num_tasks, ranges)
        for worker in prange(num_workers):
            task = take_task(ranges, worker, num_workers)
            while task >= 0:
                row, kv_head = task // parts, task % parts * num_here
                end = int32_at(lengths, row)
                begin = max(0, end - window) if window > 0 else 0
                next_row, next_head = min(task + 1, num_tasks - 1) // parts, (task + 1) % parts * num_here
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
                    num_here,
                    begin,
                    end,
                    later,
                    scale,
                    softcap,
                )
                task = take_task(ranges, worker, num_workers)

    return attend_all


def _add_one_by_one(group: int, head_dim: int, block: int, item_bytes: int) -> Callable[..., None]:
    """Sums of a page's values, weights in float32: tokens ``begin`` to ``end`` of the page at ``values``."""
    rows, head_bytes, sum_bytes = rows_for(group, head_dim), item_bytes * head_dim, 4 * head_dim

    @jit(fastmath=FAST_MATH, error_model="numpy", boundscheck=False)
    def add_page(values, ahead, sums, weights, stride, begin, end):  # type: ignore[no-untyped-def]
        whole = end // block * block  # past it, what the page holds may be anything, even NaN
        for t in range(begin, whole, block):
            for g in range(0, group, rows):
                total, weight = sums + g * sum_bytes, weights + g * stride + (t - begin) * 4
                value, then = values + t * head_bytes, ahead + t * head_bytes
                add_weighted_tokens(total, value, then, weight, stride, head_dim, rows, block, item_bytes)
        for t in range(max(begin, whole), end):
            for g in range(0, group, rows):
                total, weight = sums + g * sum_bytes, weights + g * stride + (t - begin) * 4
                value, then = values + t * head_bytes, ahead + t * head_bytes
                add_weighted_tokens(total, value, then, weight, stride, head_dim, rows, 1, item_bytes)

    return add_page


def _add_in_pairs(group: int, head_dim: int) -> Callable[..., None]:
    """The same of bfloat16, with weights in bfloat16, two tokens at a time; ``begin`` is even.

    A last token without a second pairs with itself, and the weight is that of a token which is not seen.
    """
    rows, head_bytes, sum_bytes = rows_for(group, head_dim), 2 * head_dim, 4 * head_dim
    pairs = MAX_TOKENS // 2

    @jit(fastmath=FAST_MATH, error_model="numpy", boundscheck=False)
    def add_page(values, ahead, sums, weights, stride, begin, end):  # type: ignore[no-untyped-def]
        whole = end // MAX_TOKENS * MAX_TOKENS  # past it, what the page holds may be anything, even NaN
        for t in range(begin, whole, MAX_TOKENS):
            for g in range(0, group, rows):
                total, weight = sums + g * sum_bytes, weights + g * stride + (t - begin) * 2
                value, then = values + t * head_bytes, ahead + t * head_bytes
                second = value + head_bytes
                add_weighted_pairs(total, value, second, then, weight, stride, head_dim, rows, pairs)
        for t in range(max(begin, whole), end, 2):
            for g in range(0, group, rows):
                total, weight = sums + g * sum_bytes, weights + g * stride + (t - begin) * 2
                value, then = values + t * head_bytes, ahead + t * head_bytes
                second = value + head_bytes if t + 1 < end else value
                add_weighted_pairs(total, value, second, then, weight, stride, head_dim, rows, 1)

    return add_page


def cpu_kernel_takes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this kernel covers tensors on a device in a dtype."""
    return device.type == "cpu" and dtype in KERNEL_DTYPES


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
