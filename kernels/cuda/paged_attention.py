"""``paged_decode_attention`` and ``paged_extend_attention`` on a GPU: flash decoding over pages.

16-bit floats go to tensor cores (``tensor_attention``) where a probe gives what the kernel without them gives, anything
else to ``lane_attention``. Where sequences are few, each is split over several blocks, and ``combine`` merges those.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tide_kernels.cuda.attention_merge import combine_kernel
from tide_kernels.cuda.elements import elements, is_aligned
from tide_kernels.cuda.kernel import IS_SIMULATED, num_processors
from tide_kernels.cuda.lane_attention import attend_kernel
from tide_kernels.cuda.launches import (
    ATTENTION_BLOCKS_PER_PROCESSOR,
    ATTENTION_MIN_TOKENS,
    ATTENTION_WARPS,
    COMBINE_THREADS,
    MAX_QUERIES_OF_PRODUCT,
    MAX_QUERIES_OF_ROWS,
    MAX_QUERIES_PER_BLOCK,
    MAX_SPLITS,
    QUERY_NUMBERS_PER_BLOCK,
)
from tide_kernels.cuda.reductions import WARP
from tide_kernels.cuda.tensor_attention import product_kernel, takes_products

logger = logging.getLogger(__name__)

PROBE_TOLERANCE = 0.02
"""Relative error that weights in 16 bits can reach."""


def paged_attention_cuda(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    row_starts: Tensor | None,
    lengths: Tensor,
    *,
    max_rows: int,
    scale: float,
    softcap: float,
    window: int,
    may_multiply: bool | None = None,
) -> Tensor:
    """``paged_extend_attention`` for checked arguments on a GPU; without ``row_starts`` every row is a sequence.

    ``may_multiply``: whether tensor cores compute where they can; None: if a probe says so.
    """
    num_rows, num_heads, head_dim = query.shape
    _, kv_heads, page_size, _ = key_pages.shape
    key_pages, value_pages = key_pages.contiguous(), value_pages.contiguous()
    query = query if query.stride(2) == 1 else query.contiguous()
    group = num_heads // kv_heads
    lanes = elements(query.dtype).lanes
    strides = query.stride(0), query.stride(1)
    is_vector = head_dim % lanes == 0 and all(stride % lanes == 0 for stride in strides)
    is_vector = is_vector and is_aligned(query, key_pages, value_pages)
    by_products = is_vector and takes_products(query.device, query.dtype, head_dim, page_size)
    if by_products and may_multiply is None:
        may_multiply = products_are_right(query.device, query.dtype, head_dim)
    by_products = by_products and bool(may_multiply)
    most = MAX_QUERIES_OF_PRODUCT if by_products else None
    heads, rows = queries_of_block(group, max_rows, head_dim, most)
    tiles, row_tiles = -(-group // heads), -(-max_rows // rows)
    sequences = page_table.shape[0] * row_tiles
    splits = _num_splits(query.device, sequences * kv_heads * tiles, page_table.shape[1] * page_size)
    out = torch.empty(num_rows, num_heads, head_dim, dtype=query.dtype, device=query.device)
    is_split = splits > 1
    sums, maxima = (
        torch.empty(shape if is_split else (1,), dtype=torch.float32, device=query.device)
        for shape in ((splits, num_rows, num_heads, head_dim), (2, splits, num_rows, num_heads))
    )
    facts = query.dtype, head_dim, heads, rows, page_size, softcap > 0
    kinds = {"is_extend": row_starts is not None, "is_split": is_split}
    kernel = product_kernel(*facts, **kinds) if by_products else attend_kernel(*facts, **kinds, is_vector=is_vector)
    kernel.launch(
        (sequences, kv_heads * tiles, splits),
        ATTENTION_WARPS * WARP,
        query,
        key_pages,
        value_pages,
        page_table.contiguous(),
        lengths if row_starts is None else row_starts.contiguous(),
        lengths.contiguous(),
        out,
        sums,
        maxima,
        num_rows,
        num_heads,
        kv_heads,
        page_table.shape[1],
        row_tiles,
        *strides,
        window,
        scale,
        softcap,
    )
    if is_split:
        combine_kernel(query.dtype).launch(
            (num_rows * num_heads,), COMBINE_THREADS, sums, maxima, out, num_rows * num_heads, head_dim, splits
        )
    return out


def products_are_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether tensor cores give on this device what the other kernel gives, asked once. Not while a graph is captured,
    as that holds nothing that was not run before."""
    if IS_SIMULATED:
        return True
    key = device, dtype, head_dim
    if key not in _PROBED and not torch.cuda.is_current_stream_capturing():
        _PROBED[key] = _probe(device, dtype, head_dim)
    return _PROBED.get(key, False)


_PROBED: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def _probe(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Attend with three sequences of random numbers by both kernels."""
    generator = torch.Generator().manual_seed(0)
    lengths, kv_heads, group, page_size = [5, 33, 64], 2, 4, 16

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    table = torch.randperm(12, generator=generator).int().view(3, 4).to(device)
    pages = random(12, kv_heads, page_size, head_dim), random(12, kv_heads, page_size, head_dim)
    asked = random(3, kv_heads * group, head_dim), *pages, table, None, torch.tensor(lengths).int().to(device)
    try:
        by_products, by_lanes = (
            paged_attention_cuda(
                *asked, max_rows=1, scale=head_dim**-0.5, softcap=0.0, window=0, may_multiply=is_first
            ).float()
            for is_first in (True, False)
        )
    except Exception as error:  # the compiler's or the driver's, of which there is no list
        logger.warning("attention does without tensor cores: %s", str(error).split("\n")[0])
        return False
    difference = float((by_products - by_lanes).norm() / by_lanes.norm())
    if not difference <= PROBE_TOLERANCE:
        logger.warning("attention does without tensor cores, which differ by %.2g in a probe", difference)
    return difference <= PROBE_TOLERANCE


def queries_of_block(group: int, max_rows: int, head_dim: int, most: int | None = None) -> tuple[int, int]:
    """Heads of a group, and rows of a sequence, that a block takes at once; ``most`` together, where that is given."""
    queries = most or min(MAX_QUERIES_PER_BLOCK, QUERY_NUMBERS_PER_BLOCK // head_dim)
    heads = -(-group // -(-group // queries))
    return heads, min(max_rows, max(1, (most or min(queries, MAX_QUERIES_OF_ROWS)) // heads))


def _num_splits(device: torch.device, blocks: int, max_tokens: int) -> int:
    wished = -(-ATTENTION_BLOCKS_PER_PROCESSOR * num_processors(device) // max(blocks, 1))
    return max(1, min(wished, max_tokens // ATTENTION_MIN_TOKENS, MAX_SPLITS))
