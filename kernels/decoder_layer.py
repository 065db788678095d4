"""LLaMA-like layers in bfloat16 for rows that attend row by row, in one call: calls take as long as few rows' work.

The parts are the kernels of this package, one after another.
``FusedLayer`` in ``tide_ray.models`` computes the same in more calls, and is what the tests compare with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
from tide_kernels.vectors import int64_at

NUM_FACTS = 17


@dataclass(frozen=True, slots=True)
class Places:
    """Where the rows' K/V go and what they attend to.

    Pages of K and of V ``[P, H_kv, page_size, d]`` of each layer; page numbers and offsets of the rows, long ``[N]``;
    page table int32 ``[N, n]`` and lengths int32 ``[N]`` of their sequences.
    """

    pools: Sequence[tuple[Tensor, Tensor]]
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
    def kind(self) -> tuple[Any, ...]:
        """What layers must have in common to run in one call."""
        return self.sizes, self.head_dim, self.eps, self.scale, self.softcap

    @functools.cached_property
    def facts(self) -> np.ndarray:
        """What a layer has of its own, int64 ``[NUM_FACTS]``: addresses of weights (0 for none), and the window."""
        norms = (self.first_norm, self.second_norm, self.query_norm, self.key_norm)
        products = (self.qkv, self.out, self.gate_up, self.down)
        return np.array(
            [
                *(0 if norm is None else norm.data_ptr() for norm in norms),
                *(number for product in products for number in product.address),
                self.window,
            ]
        )

    @functools.cached_property
    def epsilons(self) -> tuple[np.float32, ...]:
        """``eps`` as the kernel takes it."""
        return tuple(np.float32(eps) for eps in self.eps)


def decode_layers(hidden: Tensor, cos: Tensor, sin: Tensor, places: Places, layers: Sequence[LayerWeights]) -> Tensor:
    """Run layers of one kind; in each, the rows' K and V are in their pages before any row attends.

    Args:
        hidden: bfloat16 ``[1, N, D]``.
        cos, sin: bfloat16 ``[N, d]``.

    Returns:
        ``[1, N, D]``.

    Raises:
        ValueError: shapes, dtypes or strides do not fit together.
    """
    _check(hidden, cos, sin, places, layers)
    hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
    num_rows, like = hidden.shape[1], layers[0]
    width, num_heads, kv_heads, inner = like.sizes
    page_size, head_dim = places.pools[0][0].shape[2], like.head_dim
    out = torch.empty_like(hidden)
    joint = hidden.new_empty(num_rows, num_heads + 2 * kv_heads, head_dim)
    attended = hidden.new_empty(num_rows, num_heads * head_dim)
    scratch = hidden.new_empty(num_rows * (3 * width + inner))
    facts = np.concatenate([layer.facts for layer in layers])
    pools = np.array([pool.data_ptr() for pair in places.pools for pool in pair])
    launch(
        _all_layers(head_dim, num_heads // kv_heads, page_size),
        (hidden.data_ptr(), out.data_ptr(), joint.data_ptr(), attended.data_ptr(), scratch.data_ptr()),
        (facts.ctypes.data, pools.ctypes.data, len(layers)),
        like.epsilons,
        (cos.data_ptr(), sin.data_ptr()),
        (places.page_numbers.data_ptr(), places.offsets.data_ptr()),
        (places.table.data_ptr(), places.table.shape[1], places.lengths.data_ptr()),
        num_rows,
        like.sizes,
        (np.float32(like.scale), np.float32(like.softcap)),
    )
    return out


def _check(hidden: Tensor, cos: Tensor, sin: Tensor, places: Places, layers: Sequence[LayerWeights]) -> None:
    num_rows, (keys, values), layer = hidden.shape[1], places.pools[0], layers[0]
    if len(places.pools) != len(layers) or any(other.kind != layer.kind for other in layers):
        raise ValueError(f"{len(layers)} layers with {len(places.pools)} pools do not run in one call")
    pools = keys.shape[1], keys.shape[3]
    if hidden.shape != (1, num_rows, layer.sizes[0]) or pools != (layer.num_kv_heads, layer.head_dim):
        raise ValueError(f"rows {tuple(hidden.shape)} and pages {tuple(keys.shape)} do not fit the layer {layer.sizes}")
    if cos.shape != (num_rows, layer.head_dim) or sin.shape != cos.shape:
        raise ValueError(f"tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit {num_rows} rows")
    if any(pool.shape != keys.shape for pair in places.pools for pool in pair):
        raise ValueError(f"values {tuple(values.shape)} or another layer's pages do not fit pages {tuple(keys.shape)}")
    of_rows = places.page_numbers, places.offsets, places.table, places.lengths
    if any(len(t) != num_rows for t in of_rows):
        raise ValueError(f"places of {len(places.page_numbers)} rows do not fit {num_rows} rows")
    pages = [pool for pair in places.pools for pool in pair]
    if any(t.dtype != torch.bfloat16 for t in (hidden, cos, sin, *pages)):
        raise ValueError(f"rows, tables and pages must be bfloat16, got {hidden.dtype}, {cos.dtype}, {keys.dtype}")
    if [t.dtype for t in of_rows] != [torch.long, torch.long, torch.int32, torch.int32]:
        raise ValueError(f"places must be long, long, int32, int32, got {', '.join(str(t.dtype) for t in of_rows)}")
    if not all(t.is_contiguous() for t in (*pages, *of_rows)):
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
    """One layer; weights before attention and after it, as ``_before`` and ``_after`` take them."""
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


@functools.cache
def _all_layers(head_dim: int, group: int, page_size: int) -> Callable[..., None]:
    run_whole = _whole(head_dim, group, page_size)

    @jit(nogil=True, boundscheck=False)
    def product_at(facts, number):  # type: ignore[no-untyped-def]
        return int64_at(facts, number), int64_at(facts, number + 1), int64_at(facts, number + 2)

    @jit(nogil=True, boundscheck=False, error_model="numpy")
    def run_all(addresses, layers, eps, tables, places, sequences, num_rows, sizes, scaling):  # type: ignore[no-untyped-def]
        source, out, joint, attended, scratch = addresses
        facts, pools, num_layers = layers
        between = scratch
        scratch += num_rows * sizes[0] * ITEM_BYTES
        for layer in range(num_layers):
            # The last one writes ``out``, those before it take turns, so that none writes what it reads.
            target = out if (num_layers - layer) % 2 == 1 else between
            before = int64_at(facts, 0), product_at(facts, 4), int64_at(facts, 2), int64_at(facts, 3)
            after = int64_at(facts, 1), product_at(facts, 7), product_at(facts, 10), product_at(facts, 13)
            run_whole(
                (source, target, joint, attended, scratch), before, after, eps, tables,
                (int64_at(pools, 0), int64_at(pools, 1)), places, sequences, num_rows, sizes, scaling,
                int64_at(facts, 16),
            )  # fmt: skip
            source = target
            facts += NUM_FACTS * 8
            pools += 2 * 8

    return run_all
