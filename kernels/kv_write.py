"""Writes K and V of packed rows into their pages.

``write_kv`` chooses: a Numba CPU kernel where rows lie in memory one after another, the torch reference elsewhere. Both
only copy, so they agree bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from tide_kernels.cpu import as_words, jit


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
    if key.device.type == "cpu" and key_pages.is_contiguous() and value_pages.is_contiguous():
        _copy_rows(
            as_words(key_pages),
            as_words(value_pages),
            page_numbers.numpy(),
            offsets.numpy(),
            as_words(key),
            as_words(value),
        )
    else:
        write_kv_reference(key_pages, value_pages, page_numbers, offsets, key, value)


def write_kv_reference(
    key_pages: Tensor, value_pages: Tensor, page_numbers: Tensor, offsets: Tensor, key: Tensor, value: Tensor
) -> None:
    """``write_kv`` in torch."""
    key_pages[page_numbers, :, offsets] = key
    value_pages[page_numbers, :, offsets] = value


@jit(nogil=True, boundscheck=False)
def _copy_rows(key_pages, value_pages, page_numbers, offsets, key, value):  # type: ignore[no-untyped-def]
    num_heads, width = key.shape[1:]
    for row in range(len(page_numbers)):
        page, offset = page_numbers[row], offsets[row]
        for head in range(num_heads):
            for d in range(width):
                key_pages[page, head, offset, d] = key[row, head, d]
            for d in range(width):
                value_pages[page, head, offset, d] = value[row, head, d]
