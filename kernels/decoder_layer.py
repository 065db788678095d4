"""A LLaMA-like layer in bfloat16 for rows that attend row by row, in one call: calls cost as much as their work.

The parts are the kernels of this package, one after another.
``FusedLayer`` in ``tide_ray.models`` computes the same in more calls, and is what the tests compare with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tide_kernels.cpu import jit, launch
from tide_kernels.kv_write import copy_rows
from tide_kernels.paged_attention_cpu import attend_kernel
from tide_kernels.rms_norm import normalise
from tide_kernels.rotary import turn_rows
from tide_kernels.tiled_linear import ITEM_BYTES, TiledWeights, multiply, multiply_added, multiply_gated


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows' K/V go and what they attend to.

    Pages ``[P, H_kv, page_size, d]`` of one layer; page numbers and offsets of the rows, long ``[N]``; page table int32
    ``[N, n]`` and lengths int32 ``[N]`` of their sequences.
    """

    key_pages: Tensor
    value_pages: Tensor
    page_numbers: Tensor
    offsets: Tensor
    table: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights and constants; norms are weights ``[D]``, head norms ``[d]`` or None.

    What every call passes on is worked out once, as weights stay where they are.
    """

    first_norm: Tensor
    second_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    qkv: TiledWeights
    out: TiledWeights
    gate_up: TiledWeights
    down: TiledWeights
    eps: tuple[float, float, float, float]  # of the norms in their order above
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int

    @functools.cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Widths of a row, of its heads of each kind, and of the feed-forward part's middle."""
        return self.first_norm.shape[0], self.num_heads, self.num_kv_heads, self.down.num_inputs

    @functools.cached_property
    def around_attention(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Addresses of what is before attention, and of what is after it."""
        head_norms = (0 if norm is None else norm.data_ptr() for norm in (self.query_norm, self.key_norm))
        before = self.first_norm.data_ptr(), self.qkv.address, *head_norms
        return before, (self.second_norm.data_ptr(), self.out.address, self.gate_up.address, self.down.address)

    @functools.cached_property
    def epsilons(self) -> tuple[np.float32, ...]:
        return tuple(np.float32(eps) for eps in self.eps)


def decode_layer(hidden: Tensor, cos: Tensor, sin: Tensor, places: Places, layer: LayerWeights) -> Tensor:
    """Run the layer; the rows' K and V are in their pages before any row attends.

    Args:
        hidden: bfloat16 ``[1, N, D]``.
        cos, sin: bfloat16 ``[N, d]``.

    Returns:
        ``[1, N, D]``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit together.
    """
    _check(hidden, cos, sin, places, layer)
    hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
    num_rows = hidden.shape[1]
    width, num_heads, kv_heads, inner = layer.sizes
    page_size, head_dim = places.key_pages.shape[2], layer.head_dim
    out = torch.empty_like(hidden)
    joint = hidden.new_empty(num_rows, num_heads + 2 * kv_heads, head_dim)
    attended = hidden.new_empty(num_rows, num_heads * head_dim)
    scratch = hidden.new_empty(num_rows * (2 * width + inner))
    before, after = layer.around_attention
    launch(
        _whole(head_dim, num_heads // kv_heads, page_size),
        (hidden.data_ptr(), out.data_ptr(), joint.data_ptr(), attended.data_ptr(), scratch.data_ptr()),
        before,
        after,
        layer.epsilons,
        (cos.data_ptr(), sin.data_ptr()),
        (places.key_pages.data_ptr(), places.value_pages.data_ptr()),
        (places.page_numbers.data_ptr(), places.offsets.data_ptr()),
        (places.table.data_ptr(), places.table.shape[1], places.lengths.data_ptr()),
        num_rows,
        layer.sizes,
        (np.float32(layer.scale), np.float32(layer.softcap)),
        layer.window,
    )
    return out


def _check(hidden: Tensor, cos: Tensor, sin: Tensor, places: Places, layer: LayerWeights) -> None:
    num_rows, (keys, values) = hidden.shape[1], (places.key_pages, places.value_pages)
    pools = keys.shape[1], keys.shape[3]
    if hidden.shape != (1, num_rows, layer.sizes[0]) or pools != (layer.num_kv_heads, layer.head_dim):
        raise ValueError(f"rows {tuple(hidden.shape)} and pages {tuple(keys.shape)} do not fit the layer {layer.sizes}")
    if cos.shape != (num_rows, layer.head_dim) or sin.shape != cos.shape or keys.shape != values.shape:
        raise ValueError(f"tables {tuple(cos.shape)}, {tuple(sin.shape)} or values {tuple(values.shape)} do not fit")
    of_rows = places.page_numbers, places.offsets, places.table, places.lengths
    if any(len(t) != num_rows for t in of_rows):
        raise ValueError(f"places of {len(places.page_numbers)} rows do not fit {num_rows} rows")
    if any(t.dtype != torch.bfloat16 for t in (hidden, cos, sin, keys, values)):
        raise ValueError(f"rows, tables and pages must be bfloat16, got {hidden.dtype}, {cos.dtype}, {keys.dtype}")
    if [t.dtype for t in of_rows] != [torch.long, torch.long, torch.int32, torch.int32]:
        raise ValueError(f"places must be long, long, int32, int32, got {', '.join(str(t.dtype) for t in of_rows)}")
    if not all(t.is_contiguous() for t in (keys, values, *of_rows)):
        raise ValueError("pages and places must be contiguous")


@functools.cache
def _before(head_dim: int) -> Callable[..., None]:
    head_bytes = ITEM_BYTES * head_dim
    norm, turn = normalise(ITEM_BYTES), turn_rows(head_dim // 2, ITEM_BYTES)

    @jit(nogil=True, boundscheck=False, error_model="numpy")
    def run_before(addresses, weights, eps, tables, num_rows, sizes):  # type: ignore[no-untyped-def]
        hidden, joint, normed = addresses
        first_norm, qkv, query_norm, key_norm = weights
        width, num_heads, kv_heads, _ = sizes
        num_all = num_heads + 2 * kv_heads
        step = num_all * head_bytes
        norm(hidden, 0, 0, first_norm, normed, num_rows, width, eps[0])
        multiply(normed, qkv, joint, num_rows, width // 2, num_all * head_dim)
        if query_norm != 0:
            for row in range(num_rows):
                query, key = joint + row * step, joint + row * step + num_heads * head_bytes
                norm(query, 0, 0, query_norm, query, num_heads, head_dim, eps[2])
                norm(key, 0, 0, key_norm, key, kv_heads, head_dim, eps[3])
        turn(joint, step, tables[0], tables[1], num_rows, num_heads + kv_heads)

    return run_before


@functools.cache
def _after(head_dim: int) -> Callable[..., None]:
    norm = normalise(ITEM_BYTES)

    @jit(nogil=True, boundscheck=False, error_model="numpy")
    def run_after(addresses, weights, eps, num_rows, sizes):  # type: ignore[no-untyped-def]
        hidden, attended, out, scratch = addresses
        second_norm, projection, gate_up, down = weights
        width, num_heads, _, inner = sizes
        row_bytes = width * ITEM_BYTES
        normed = scratch
        total = normed + num_rows * row_bytes
        middle = total + num_rows * row_bytes
        multiply_added(attended, projection, hidden, total, num_rows, num_heads * head_dim // 2, width)
        norm(total, 0, 0, second_norm, normed, num_rows, width, eps[1])
        multiply_gated(normed, gate_up, middle, num_rows, width // 2, 2 * inner)
        multiply_added(middle, down, total, out, num_rows, inner // 2, width)

    return run_after


@functools.cache
def _whole(head_dim: int, group: int, page_size: int) -> Callable[..., None]:
    head_bytes = ITEM_BYTES * head_dim
    run_before, run_after = _before(head_dim), _after(head_dim)
    attend = attend_kernel(head_dim, group, page_size, ITEM_BYTES)

    @jit(nogil=True, boundscheck=False, error_model="numpy")
    def run_whole(  # type: ignore[no-untyped-def]
        addresses, before, after, eps, tables, pools, places, sequences, num_rows, sizes, scaling, window
    ):
        hidden, out, joint, attended, scratch = addresses
        _, num_heads, kv_heads, _ = sizes
        step = (num_heads + 2 * kv_heads) * head_bytes
        key = joint + num_heads * head_bytes
        value = key + kv_heads * head_bytes
        run_before((hidden, joint, scratch), before, eps, tables, num_rows, sizes)
        copy_rows(
            pools[0], pools[1], places[0], places[1], key, step, value, step, num_rows, kv_heads, page_size, head_bytes
        )
        attend(
            joint, step, pools[0], pools[1], attended, sequences[0], sequences[1], sequences[2],
            num_rows, kv_heads, scaling[0], scaling[1], window,
        )  # fmt: skip
        run_after((hidden, attended, out, scratch), after, eps, num_rows, sizes)

    return run_whole
