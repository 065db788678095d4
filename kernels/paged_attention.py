"""Attention over paged K/V, without padding and without repeating K/V for grouped queries.

``paged_decode_attention`` takes one query row per sequence, ``paged_extend_attention`` a few. Both choose: the Numba
CPU kernel for float32 and bfloat16 on a CPU, the CUDA kernel on a GPU, the torch reference elsewhere. The references
have the same signatures and are the oracles of the tests.

On a GPU the order in which a row's sums are taken depends on how many sequences there are and how wide the page table
is, as few long sequences are split over more blocks: beside other rows a row differs in its last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.cuda.launches import ATTENTION_MAX_HEAD_DIM
from tide_kernels.paged_attention_cpu import cpu_decode_attention, cpu_kernel_takes


def paged_decode_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attention of one query row per sequence over its K/V pages.

    Args:
        query: ``[N, H, d]``.
        key_pages, value_pages: ``[num_pages, H_kv, page_size, d]``, same dtype and device as ``query``; H is a
            multiple of H_kv.
        page_table: int32 ``[N, max_pages]``, page numbers of each row's sequence in order.
        lengths: int32 ``[N]``, tokens that each row attends to (at least 1); they fill the pages in order.
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)`` when positive (Gemma 2, arXiv 2408.00118).
        window: each row sees only its last ``window`` tokens when positive.

    Returns:
        ``[N, H, d]`` in the dtype of ``query``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(query, key_pages, value_pages, page_table, lengths)
    if _runs_on_gpu(query, key_pages, value_pages, page_table, lengths):
        from tide_kernels.cuda.paged_attention import paged_attention_cuda

        return paged_attention_cuda(
            query,
            key_pages,
            value_pages,
            page_table,
            None,
            lengths,
            max_rows=1,
            scale=scale,
            softcap=softcap,
            window=window,
        )
    if cpu_kernel_takes(query.device, query.dtype):
        return cpu_decode_attention(
            query, key_pages, value_pages, page_table, lengths, scale=scale, softcap=softcap, window=window
        )
    return paged_decode_attention_reference(
        query, key_pages, value_pages, page_table, lengths, scale=scale, softcap=softcap, window=window
    )


def paged_extend_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    row_starts: Tensor,
    lengths: Tensor,
    *,
    max_rows: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Attention of a few query rows per sequence over its K/V pages, which rows of a sequence read together.

    Args:
        query, key_pages, value_pages, scale, softcap, window: as in ``paged_decode_attention``.
        page_table: int32 ``[S, max_pages]``, page numbers of each sequence in order.
        row_starts: int32 ``[S + 1]``, the first row of each sequence, and N.
        lengths: int32 ``[N]``, tokens that each row attends to, rising within a sequence.
        max_rows: rows of the sequence that has most, known without asking the device.

    Returns:
        ``[N, H, d]`` in the dtype of ``query``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check_rows(page_table, row_starts, max_rows)
    _check(query, key_pages, value_pages, None, lengths)
    if _runs_on_gpu(query, key_pages, value_pages, page_table, row_starts, lengths):
        from tide_kernels.cuda.paged_attention import paged_attention_cuda

        return paged_attention_cuda(
            query,
            key_pages,
            value_pages,
            page_table,
            row_starts,
            lengths,
            max_rows=max_rows,
            scale=scale,
            softcap=softcap,
            window=window,
        )
    by_row = _tables_by_row(page_table, row_starts)
    return paged_decode_attention(
        query, key_pages, value_pages, by_row, lengths, scale=scale, softcap=softcap, window=window
    )


def paged_extend_attention_reference(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    row_starts: Tensor,
    lengths: Tensor,
    *,
    max_rows: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """``paged_extend_attention`` in torch: every row as a sequence of its own."""
    _check_rows(page_table, row_starts, max_rows)
    by_row = _tables_by_row(page_table, row_starts)
    return paged_decode_attention_reference(
        query, key_pages, value_pages, by_row, lengths, scale=scale, softcap=softcap, window=window
    )


def _tables_by_row(page_table: Tensor, row_starts: Tensor) -> Tensor:
    return page_table.repeat_interleave((row_starts[1:] - row_starts[:-1]).long(), dim=0)


def unfit_heads(head_dim: int) -> str | None:
    """Why the CUDA kernels do not take heads of a width; None where they do."""
    return gpu.over("heads", head_dim, ATTENTION_MAX_HEAD_DIM)


def _runs_on_gpu(query: Tensor, *others: Tensor) -> bool:
    return gpu.run_on(query, *others, unfit=unfit_heads(query.shape[2]))


def paged_decode_attention_reference(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """The same in torch operations on any device: gathers the pages, pads to the longest row, masks."""
    num_rows, num_heads, head_dim = query.shape
    kv_heads = key_pages.shape[1]
    table = page_table.long()
    keys = key_pages[table].transpose(1, 2).flatten(2, 3).float()  # [N, H_kv, T, d]
    values = value_pages[table].transpose(1, 2).flatten(2, 3).float()
    grouped = query.float().view(num_rows, kv_heads, num_heads // kv_heads, head_dim)
    scores = grouped @ keys.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    position = torch.arange(keys.shape[2], device=query.device)[None, :]
    end = lengths.long()[:, None]
    visible = position < end
    if window:
        visible &= position >= end - window
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    out = torch.softmax(scores, dim=-1) @ values.masked_fill(~visible[:, None, :, None], 0.0)
    return out.reshape(num_rows, num_heads, head_dim).to(query.dtype)


def _check_rows(page_table: Tensor, row_starts: Tensor, max_rows: int) -> None:
    if row_starts.shape != (page_table.shape[0] + 1,) or row_starts.dtype != torch.int32 or max_rows < 1:
        raise ValueError(
            f"row_starts must be int32 [{page_table.shape[0] + 1}] and max_rows positive, got {row_starts.dtype} "
            f"{tuple(row_starts.shape)} and {max_rows}"
        )
    if page_table.dtype != torch.int32:
        raise ValueError(f"page_table must be int32, got {page_table.dtype}")


def _check(query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor | None, lengths: Tensor) -> None:
    """``page_table`` is None where its rows are not the query's."""
    if query.ndim != 3 or key_pages.ndim != 4 or key_pages.shape != value_pages.shape:
        raise ValueError(
            f"query must be [N, H, d] and pages [P, H_kv, page_size, d], got {tuple(query.shape)}, "
            f"{tuple(key_pages.shape)}, {tuple(value_pages.shape)}"
        )
    if query.shape[2] != key_pages.shape[3] or query.shape[1] % key_pages.shape[1]:
        raise ValueError(f"heads do not fit: query {tuple(query.shape)}, pages {tuple(key_pages.shape)}")
    table = lengths if page_table is None else page_table
    if table.shape[0] != query.shape[0] or lengths.shape != query.shape[:1]:
        rows = query.shape[0], table.shape[0], tuple(lengths.shape)
        raise ValueError("rows do not fit: query {}, table {}, lengths {}".format(*rows))
    if table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise ValueError(f"page_table and lengths must be int32, got {table.dtype} and {lengths.dtype}")
    if not query.dtype == key_pages.dtype == value_pages.dtype:
        raise ValueError(f"dtypes differ: query {query.dtype}, keys {key_pages.dtype}, values {value_pages.dtype}")
