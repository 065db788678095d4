"""Queries and pages for the tests of both attention kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def make_case(
    page_size: int, dtype, generator, num_heads: int, kv_heads: int, head_dim: int, lengths: list[int], num_rows: int
):
    """Query of ``num_rows`` rows, pages scattered over the pool with NaN behind each last token, table, lengths."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    width = -(-max(lengths) // page_size)
    num_pages = width * len(lengths) + 2
    table = torch.randperm(num_pages, generator=generator)[: width * len(lengths)].view(len(lengths), width).int()
    keys, values = (random(num_pages, kv_heads, page_size, head_dim) for _ in range(2))
    for row, length in enumerate(lengths):
        for page, number in enumerate(table[row].tolist()):
            used = max(0, min(page_size, length - page * page_size))
            keys[number, :, used:], values[number, :, used:] = float("nan"), float("nan")
    return random(num_rows, num_heads, head_dim), keys, values, table


def without_nan(case):
    query, keys, values, table = case
    return query, keys.nan_to_num(), values.nan_to_num(), table
