"""The CUDA kernel of ``write_kv`` and ``write_kv_layers``: a warp to each head of each row in each layer."""

from __future__ import annotations

import functools

import torch
from numba import cuda, float32
from torch import Tensor

from tide_kernels.cuda.activations import reciprocal_root
from tide_kernels.cuda.elements import elements, is_aligned, load_words, store_words
from tide_kernels.cuda.kernel import FLOAT, INT, LONG, Kernel, pointer
from tide_kernels.cuda.launches import KV_WARPS
from tide_kernels.cuda.reductions import WARP, warp_sum
from tide_kernels.kv_write import HeadNorm, Rotation


def write_kv_cuda(
    key_pools: Tensor,
    value_pools: Tensor,
    page_numbers: Tensor,
    offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    rotation: Rotation | None,
    norm: HeadNorm | None,
) -> None:
    """``write_kv_layers`` for checked arguments on a GPU."""
    if not key_pools[0].is_contiguous() or key_pools.stride() != value_pools.stride():
        raise ValueError(f"each layer's pages must be contiguous, and K's lie as V's do, got {key_pools.stride()}")
    num_rows, num_layers, num_heads, head_dim = keys.shape
    keys, values = _with_whole_heads(keys), _with_whole_heads(values)
    dtype, layout = keys.dtype, "none" if rotation is None else rotation.layout
    cos = sin = keys
    turned = 0
    if rotation is not None:
        cos, sin = (table.to(dtype).contiguous() for table in (rotation.cos, rotation.sin))
        turned = cos.shape[-1]
    weight = keys if norm is None else norm.weight.contiguous()
    lanes = elements(dtype).lanes
    counts = head_dim, turned // 2, turned, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)
    is_vector = (
        layout != "interleaved"
        and all(count % lanes == 0 for count in counts)
        and is_aligned(keys, values, cos, sin, weight, key_pools, value_pools)
    )
    repeats = rotation is not None and rotation.repeats
    write_kernel(dtype, layout, repeats, norm is not None, is_vector=is_vector).launch(
        (-(-num_rows * num_layers * num_heads // KV_WARPS),),
        KV_WARPS * WARP,
        key_pools,
        value_pools,
        page_numbers.contiguous(),
        offsets.contiguous(),
        keys,
        values,
        cos,
        sin,
        weight,
        num_rows,
        num_layers,
        num_heads,
        head_dim,
        key_pools.shape[3],
        turned,
        key_pools.stride(0),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        0.0 if norm is None else norm.eps,
    )


def _with_whole_heads(rows: Tensor) -> Tensor:
    """``[N, L, H, d]`` whose heads lie one after another; a copy where they do not."""
    return rows if rows.stride(3) == 1 and rows.stride(2) == rows.shape[3] else rows.contiguous()


@functools.cache
def write_kernel(dtype: torch.dtype, layout: str, repeats: bool, is_normed: bool, *, is_vector: bool) -> Kernel:
    """The kernel for one dtype, one layout of the rotation (``none``, ``half``, ``interleaved``), with K's norm or
    without."""
    numbers = elements(dtype, is_vector=is_vector)
    lanes, load, rounded = numbers.lanes, numbers.load, numbers.rounded
    load_vector, store_vector = numbers.load_vector, numbers.store_vector
    is_turned, is_half = layout != "none", layout == "half"
    step = WARP * lanes

    @cuda.jit(device=True)
    def copy(source, i, target, j):  # type: ignore[no-untyped-def]
        if is_vector:
            a, b, c, d = load_words(source, i)
            store_words(target, j, a, b, c, d)
        else:
            target[j] = source[i]

    @cuda.jit(device=True)
    def head_factor(source, start, head_dim, eps):  # type: ignore[no-untyped-def]
        values = cuda.local.array(lanes, float32)
        total = float32(0)
        for i in range(cuda.threadIdx.x % WARP * lanes, head_dim, step):
            load_vector(source, start + i, values)
            for k in range(lanes):
                total += values[k] * values[k]
        return reciprocal_root(warp_sum(total) / float32(head_dim) + eps)

    @cuda.jit(device=True)
    def read(source, start, weight, i, factor, values):  # type: ignore[no-untyped-def]
        """``lanes`` channels of a head from the ``i``-th on, normalised."""
        load_vector(source, start + i, values)
        if is_normed:
            for k in range(lanes):
                values[k] = rounded(rounded(values[k] * factor) * load(weight, i + k))

    @cuda.jit(device=True)
    def turn(low, high, cos, sin, table, first, second):  # type: ignore[no-untyped-def]
        """Channels and their partners, whose entries of the tables begin at ``first`` and ``second``."""
        for k in range(lanes):
            a, b = low[k], high[k]
            cos_a, sin_a = load(cos, table + first + k), load(sin, table + first + k)
            cos_b, sin_b = load(cos, table + second + k), load(sin, table + second + k)
            low[k] = rounded(rounded(a * cos_a) - rounded(b * sin_a))
            high[k] = rounded(rounded(b * cos_b) + rounded(a * sin_b))

    def write_heads(  # type: ignore[no-untyped-def]
        key_pools,
        value_pools,
        page_numbers,
        offsets,
        keys,
        values,
        cos,
        sin,
        norm_weight,
        num_rows,
        num_layers,
        num_heads,
        head_dim,
        page_size,
        turned,
        layer_stride,
        key_row,
        key_layer,
        value_row,
        value_layer,
        eps,
    ):
        low = cuda.local.array(lanes, float32)
        high = cuda.local.array(lanes, float32)
        item = cuda.blockIdx.x * (cuda.blockDim.x // WARP) + cuda.threadIdx.x // WARP
        if item >= num_rows * num_layers * num_heads:
            return
        first = cuda.threadIdx.x % WARP * lanes
        head, layer, row = item % num_heads, item // num_heads % num_layers, item // (num_heads * num_layers)
        slot = (page_numbers[row] * num_heads + head) * page_size + offsets[row]
        target = layer * layer_stride + slot * head_dim
        value = row * value_row + layer * value_layer + head * head_dim
        for i in range(first, head_dim, step):
            copy(values, value + i, value_pools, target + i)
        source = row * key_row + layer * key_layer + head * head_dim
        factor = float32(0)
        if is_normed:
            factor = head_factor(keys, source, head_dim, eps)
        if is_turned:
            half, table = turned // 2, row * turned
            for i in range(first, half, step):
                if is_half:
                    a, b, entry_a, entry_b = i, half + i, i, half + i
                else:
                    a, b = 2 * i, 2 * i + 1
                    entry_a, entry_b = (i, i) if repeats else (a, b)
                read(keys, source, norm_weight, a, factor, low)
                read(keys, source, norm_weight, b, factor, high)
                turn(low, high, cos, sin, table, entry_a, entry_b)
                store_vector(key_pools, target + a, low)
                store_vector(key_pools, target + b, high)
        for i in range(turned + first, head_dim, step):
            if is_normed:
                read(keys, source, norm_weight, i, factor, low)
                store_vector(key_pools, target + i, low)
            else:
                copy(keys, source + i, key_pools, target + i)

    cells, longs = pointer(dtype), pointer(torch.int64)
    tensors = cells, cells, longs, longs, cells, cells, cells, cells, cells
    return Kernel(write_heads, *tensors, *[INT] * 6, *[LONG] * 5, FLOAT, max_threads=KV_WARPS * WARP)
