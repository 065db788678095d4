"""Decode attention over paged K/V on a CPU, in Numba: streams each page once, float32 accumulation.

bfloat16 is read and written as 16-bit patterns. Work is split by (row, K/V head).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import float32, prange
from torch import Tensor

from tide_kernels.cpu import as_words, jit, launch
from tide_kernels.attention_vectors import (
    add_weighted_tokens,
    exponentiate,
    raise_to,
    rows_for,
    score_tokens,
    tokens_for,
)

# Reassociation and contraction let the compiler vectorise sums; infinities and NaN keep their meaning.
FAST_MATH = {"reassoc", "contract", "arcp", "nsz"}


@functools.cache
def _kernel(head_dim: int, group: int, page_size: int, item_bytes: int) -> Callable[..., None]:
    """The kernel for one shape and element size. Compiled at the first call, a few seconds, and kept on disk."""
    rows, block = rows_for(group), tokens_for(page_size)
    row_bytes = head_dim * item_bytes
    page_bytes = page_size * row_bytes
    query_bytes = 4 * head_dim

    @jit(fastmath=FAST_MATH, error_model="numpy", boundscheck=False)
    def attend_one(query, keys, values, out, pages, kv_head, begin, end, later, softcap):  # type: ignore[no-untyped-def]
        kv_heads = keys.shape[1]
        key_pool, value_pool = keys.ctypes.data, values.ctypes.data
        scores = np.empty((group, page_size), np.float32)
        maxima = np.empty(block, np.float32)
        tops = np.full(group, -np.inf, np.float32)
        norms = np.zeros((group, block), np.float32)
        total = np.zeros((group, head_dim), np.float32)
        first, last = begin // page_size, (end + page_size - 1) // page_size
        for p in range(first, last):
            at = (pages[p] * kv_heads + kv_head) * page_bytes
            # Pages lie anywhere, so the hardware does not foresee the next one.
            ahead = (pages[p + 1] * kv_heads + kv_head) * page_bytes if p + 1 < last else later * page_bytes
            low, high = max(begin - p * page_size, 0), min(page_size, end - p * page_size)
            aligned, padded = low // block * block, (high + block - 1) // block * block
            # Whole blocks are scored: a page is there to its end, and what lies past the sequence's is not looked at.
            for t in range(aligned, padded, block):
                for g in range(0, group, rows):
                    score_tokens(
                        query.ctypes.data + (kv_head * group + g) * query_bytes,
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
            for d in range(head_dim):
                out[kv_head * group + g, d] = total[g, d] * inverse

    @jit(parallel=True, nogil=True, fastmath=FAST_MATH)
    def attend_all(query, keys, values, out, table, lengths, softcap, window):  # type: ignore[no-untyped-def]
        kv_heads = keys.shape[1]
        num_tasks = query.shape[0] * kv_heads
        for task in prange(num_tasks):
            row, kv_head = task // kv_heads, task % kv_heads
            end = lengths[row]
            begin = max(0, end - window) if window > 0 else 0
            next_row, next_head = min(task + 1, num_tasks - 1) // kv_heads, (task + 1) % kv_heads
            next_page = (lengths[next_row] - window) // page_size if window > 0 and lengths[next_row] > window else 0
            later = table[next_row, next_page] * kv_heads + next_head
            attend_one(query[row], keys, values, out[row], table[row], kv_head, begin, end, later, softcap)

    return attend_all


def cpu_kernel_takes(query: Tensor) -> bool:
    """Whether this kernel covers the query's device and dtype."""
    return query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)


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
    out = torch.empty(query.shape, dtype=torch.float32)
    num_heads, head_dim = query.shape[1:]
    _, kv_heads, page_size, _ = key_pages.shape
    kernel = _kernel(head_dim, num_heads // kv_heads, page_size, query.element_size())
    launch(
        kernel,
        as_words(query.float() * scale),
        as_words(key_pages),
        as_words(value_pages),
        out.numpy(),
        as_words(page_table),
        as_words(lengths),
        np.float32(softcap),
        window,
    )
    return out.to(query.dtype)
