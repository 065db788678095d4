"""Writes K and V of packed rows into their pages: of one layer, or of many at once with K normalised and rotated.

Both choose: a Numba kernel on a CPU where rows lie in memory one after another and on a GPU, the torch reference
elsewhere. ``write_kv`` only copies, so all agree bit for bit; K are turned with torch's roundings on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numba import prange
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.cpu import PARALLEL_FROM, is_for_kernels, jit, launch, with_whole_heads
from tide_kernels.layer_vectors import turn_halves
from tide_kernels.vectors import copy_bytes, int64_at

LAYOUTS = ("half", "interleaved")


@dataclass(frozen=True, slots=True)
class Rotation:
    """How K is turned to its position (arXiv 2104.09864).

    ``cos``, ``sin``: ``[N, r]``; channels past r stay. ``layout``: channel i turns with ``half``: i + r / 2, or
    ``interleaved``: its neighbour; there ``repeats`` says that the tables' first half holds one entry for each pair.
    """

    cos: Tensor
    sin: Tensor
    layout: str = "half"
    repeats: bool = False

    def __call__(self, key: Tensor) -> Tensor:
        """``key`` ``[N, ..., d]`` turned, in torch, with roundings of both products and of the sum."""
        width = self.cos.shape[-1]
        cos, sin = self.cos, self.sin
        if self.repeats:
            cos, sin = (table[..., : width // 2].repeat_interleave(2, dim=-1) for table in (cos, sin))
        lead = (len(cos), *[1] * (key.ndim - 2), width)
        cos, sin = cos.to(key.dtype).view(lead), sin.to(key.dtype).view(lead)
        turned, rest = key[..., :width], key[..., width:]
        if self.layout == "half":
            partner = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
        else:
            partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        rotated = turned * cos + partner * sin
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


@dataclass(frozen=True, slots=True)
class HeadNorm:
    """RMS norm of each head of K before it is turned: ``weight`` ``[d]`` of K's dtype."""

    weight: Tensor
    eps: float

    def __call__(self, key: Tensor) -> Tensor:
        """The same in torch, with the model's two roundings."""
        wide = key.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(key.dtype)


def write_kv_layers(
    key_pools: Tensor,
    value_pools: Tensor,
    page_numbers: Tensor,
    offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rotation: Rotation | None = None,
    norm: HeadNorm | None = None,
) -> None:
    """Store K and V of N rows in L layers, K as the projection gives it.

    Args:
        key_pools, value_pools: ``[L, num_pages, H_kv, page_size, d]``, written in place.
        page_numbers, offsets: long ``[N]``, where each row's token lies; no two rows in one place.
        keys, values: ``[N, L, H_kv, d]``, of the pools' dtype and device; views of one product's output are welcome.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    num_layers, _, num_heads, _, head_dim = key_pools.shape
    shape = len(page_numbers), num_layers, num_heads, head_dim
    fits = keys.shape == values.shape == shape and key_pools.shape == value_pools.shape
    if not fits or len(offsets) != len(page_numbers):
        raise ValueError(
            f"rows do not fit: keys {tuple(keys.shape)}, values {tuple(values.shape)}, {len(page_numbers)} pages, "
            f"{len(offsets)} offsets, pools {tuple(key_pools.shape)} and {tuple(value_pools.shape)}"
        )
    _check_dtypes(key_pools, value_pools, page_numbers, offsets, keys, values)
    if rotation is not None:
        _check_rotation(rotation, keys)
    if norm is not None and (norm.weight.shape != (head_dim,) or norm.weight.dtype != keys.dtype):
        raise ValueError(f"a head's norm must have [{head_dim}] weights in {keys.dtype}")
    if norm is not None and norm.weight.device != keys.device:
        raise ValueError(f"a head's norm must lie on {keys.device} like the keys, got {norm.weight.device}")
    if gpu.run_on(keys, values, key_pools, value_pools, page_numbers, offsets):
        from tide_kernels.cuda.kv_write import write_kv_cuda

        write_kv_cuda(key_pools, value_pools, page_numbers, offsets, keys, values, rotation, norm)
    elif norm is None and _are_for_the_cpu(key_pools, value_pools, page_numbers, offsets, keys, values, rotation):
        turned = 0 if rotation is None else head_dim // 2
        tables = (0, 0) if rotation is None else (rotation.cos.data_ptr(), rotation.sin.data_ptr())
        size = keys.element_size()
        launch(
            _write_layers(turned, size),
            (key_pools.data_ptr(), value_pools.data_ptr()),
            (page_numbers.data_ptr(), offsets.data_ptr()),
            (keys.data_ptr(), values.data_ptr(), keys.stride(0) * size, keys.stride(1) * size),
            tables,
            tuple(keys.shape),
            (key_pools.shape[1], key_pools.shape[3]),
        )
    else:
        write_kv_layers_reference(
            key_pools, value_pools, page_numbers, offsets, keys, values, rotation=rotation, norm=norm
        )


def write_kv_layers_reference(
    key_pools: Tensor,
    value_pools: Tensor,
    page_numbers: Tensor,
    offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    rotation: Rotation | None = None,
    norm: HeadNorm | None = None,
) -> None:
    """``write_kv_layers`` in torch."""
    keys = keys if norm is None else norm(keys)
    keys = keys if rotation is None else rotation(keys)
    every = slice(None)
    key_pools[every, page_numbers, :, offsets] = keys
    value_pools[every, page_numbers, :, offsets] = values


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
    fits = key.shape == value.shape == (len(page_numbers), *width) and key_pages.shape == value_pages.shape
    if not fits or len(offsets) != len(page_numbers):
        raise ValueError(
            f"rows do not fit: key {tuple(key.shape)}, value {tuple(value.shape)}, {len(page_numbers)} pages, "
            f"{len(offsets)} offsets, pages {tuple(key_pages.shape)} and {tuple(value_pages.shape)}"
        )
    _check_dtypes(key_pages, value_pages, page_numbers, offsets, key, value)
    if gpu.run_on(key, value, key_pages, value_pages, page_numbers, offsets):
        from tide_kernels.cuda.kv_write import write_kv_cuda

        layer = key_pages[None], value_pages[None]
        write_kv_cuda(*layer, page_numbers, offsets, key[:, None], value[:, None], None, None)
        return
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


def _are_for_the_cpu(
    key_pools: Tensor,
    value_pools: Tensor,
    page_numbers: Tensor,
    offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Rotation | None,
) -> bool:
    """Whether the CPU kernel takes these: whole heads turned by halves, rows and layers at even steps."""
    head_dim = keys.shape[-1]
    tables: tuple[Tensor, ...] = ()
    if rotation is not None:
        tables = rotation.cos, rotation.sin
        if rotation.layout != "half" or rotation.cos.shape[-1] != head_dim:
            return False
    return (
        is_for_kernels(keys, values, key_pools, value_pools, *tables)
        and keys.stride() == values.stride()
        and keys.stride()[2:] == (head_dim, 1)
        and all(t.is_contiguous() for t in (key_pools, value_pools, page_numbers, offsets, *tables))
    )


@functools.cache
def _write_layers(half: int, item_bytes: int) -> Callable[..., None]:
    """The kernel over addresses, for heads of ``2 * half`` channels to be turned, or any that are not (0)."""
    alone, together = (_write_all(half, item_bytes, is_parallel=is_parallel) for is_parallel in (False, True))

    @jit(nogil=True)
    def write(pools, places, rows, tables, shape, pool_shape):  # type: ignore[no-untyped-def]
        if 2 * shape[0] * shape[1] * shape[2] * shape[3] < PARALLEL_FROM:
            alone(pools, places, rows, tables, shape, pool_shape)
        else:
            together(pools, places, rows, tables, shape, pool_shape)

    return write


def _write_all(half: int, item_bytes: int, *, is_parallel: bool) -> Callable[..., None]:
    @jit(parallel=is_parallel, nogil=True, boundscheck=False)
    def write_all(pools, places, rows, tables, shape, pool_shape):  # type: ignore[no-untyped-def]
        (key_pools, value_pools), (page_numbers, offsets), (cos, sin) = pools, places, tables
        keys, values, row_step, layer_step = rows
        num_rows, num_layers, num_heads, head_dim = shape
        num_pages, page_size = pool_shape
        size = head_dim * item_bytes
        for row in prange(num_rows):
            first = int64_at(page_numbers, row) * num_heads * page_size + int64_at(offsets, row)
            for layer in range(num_layers):
                for head in range(num_heads):
                    source = row * row_step + layer * layer_step + head * size
                    place = (layer * num_pages * num_heads * page_size + first + head * page_size) * size
                    copy_bytes(keys + source, key_pools + place, size)
                    copy_bytes(values + source, value_pools + place, size)
                    if half:  # in the page, so that the given rows stay as they are
                        turn_halves(key_pools + place, cos + row * size, sin + row * size, half, item_bytes)

    return write_all


def _check_rotation(rotation: Rotation, keys: Tensor) -> None:
    cos, sin = rotation.cos, rotation.sin
    width = cos.shape[-1]
    if rotation.layout not in LAYOUTS:
        raise ValueError(f"a rotation's layout must be one of {', '.join(LAYOUTS)}, got {rotation.layout!r}")
    if cos.shape != (len(keys), width) or cos.shape != sin.shape or width > keys.shape[-1] or width % 2:
        raise ValueError(f"rotary tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit keys {tuple(keys.shape)}")
    if not cos.device == sin.device == keys.device:
        raise ValueError(f"rotary tables must lie on {keys.device} like the keys, got {cos.device} and {sin.device}")


def _check_dtypes(
    key_pages: Tensor, value_pages: Tensor, page_numbers: Tensor, offsets: Tensor, key: Tensor, value: Tensor
) -> None:
    if not key.dtype == value.dtype == key_pages.dtype == value_pages.dtype:
        raise ValueError(f"dtypes differ: {key.dtype}, {value.dtype}, pages of {key_pages.dtype}, {value_pages.dtype}")
    if not page_numbers.dtype == offsets.dtype == torch.long:
        raise ValueError(f"page_numbers and offsets must be long, got {page_numbers.dtype} and {offsets.dtype}")


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
