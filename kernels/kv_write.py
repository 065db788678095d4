"""Writes K and V of packed rows into their pages.

``write_kv`` chooses: a Numba CPU kernel where rows lie in memory one after another, the torch reference elsewhere. Both
only copy, so they agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_kernels.cpu import jit, with_whole_heads
from tide_kernels.vectors import copy_bytes, int64_at


def write_kv(
    key_pages: Tensor, value_pages: Tensor, page_numbers: Tensor, offsets: Tensor, key: Tensor, value: Tensor
) -> None:
    """Store K and V of N rows.

    Args:
        key_pages, value_pages: ``[num_pages, H_kv, page_size, d]``, written in place.
        page_numbers, offsets: long ``[N]``, where each row's token lies; no two rows in one place.
        key, value: ``[N, H_kv, d]``, of the pages' dtype and device.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    width = key_pages.shape[1], key_pages.shape[3]
    if key.shape != (len(page_numbers), *width) or value.shape != key.shape or len(offsets) != len(page_numbers):
        raise ValueError(
            f"rows do not fit: key {tuple(key.shape)}, value {tuple(value.shape)}, {len(page_numbers)} pages, "
            f"{len(offsets)} offsets, pages of {width}"
        )
    if not key.dtype == value.dtype == key_pages.dtype == value_pages.dtype:
        raise ValueError(f"dtypes differ: {key.dtype}, {value.dtype}, pages of {key_pages.dtype}, {value_pages.dtype}")
    if not page_numbers.dtype == offsets.dtype == torch.long:
        raise ValueError(f"page_numbers and offsets must be long, got {page_numbers.dtype} and {offsets.dtype}")
    is_on_cpu = all(t.device.type == "cpu" for t in (key, value, key_pages, page_numbers, offsets))
    if is_on_cpu and key_pages.is_contiguous() and value_pages.is_contiguous():
        key, value = with_whole_heads(key), with_whole_heads(value)
        page_numbers, offsets = page_numbers.contiguous(), offsets.contiguous()
        size, (num_heads, page_size, head_dim) = key.element_size(), key_pages.shape[1:]
        pools = key_pages.data_ptr(), value_pages.data_ptr()
        places = page_numbers.data_ptr(), offsets.data_ptr()
        rows = key.data_ptr(), key.stride(0) * size, value.data_ptr(), value.stride(0) * size
        copy_rows(*pools, *places, *rows, len(page_numbers), num_heads, page_size, head_dim * size)
    else:
        write_kv_reference(key_pages, value_pages, page_numbers, offsets, key, value)


def write_kv_reference(
    key_pages: Tensor, value_pages: Tensor, page_numbers: Tensor, offsets: Tensor, key: Tensor, value: Tensor
) -> None:
    """``write_kv`` in torch."""
    key_pages[page_numbers, :, offsets] = key
    value_pages[page_numbers, :, offsets] = value


@jit(nogil=True, boundscheck=False)
def copy_rows(  # type: ignore[no-untyped-def]
    key_pages,
    value_pages,
    page_numbers,
    offsets,
    keys,
    key_step,
    values,
    value_step,
    num_rows,
    num_heads,
    page_size,
    size,
):
    """The kernel over addresses: steps are bytes from row to row, ``size`` the bytes of a head."""
    for row in range(num_rows):
        first = (int64_at(page_numbers, row) * num_heads * page_size + int64_at(offsets, row)) * size
        for head in range(num_heads):
            place = first + head * page_size * size
            copy_bytes(keys + row * key_step + head * size, key_pages + place, size)
            copy_bytes(values + row * value_step + head * size, value_pages + place, size)
