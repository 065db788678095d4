"""A linear layer for a few rows in bfloat16: reads every weight once, as fast as memory gives them.

oneDNN's products are made for many rows; with one to a few, most of their time is not spent reading weights. The
weights stay where oneDNN put them: its blocks of 64 outputs hold, for every pair of inputs, 64 pairs of weights.
``few_rows_linear`` is the Numba CPU kernel, ``few_rows_linear_reference`` the same in torch. Sums are float32 in both,
in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from numba import prange
from torch import Tensor

from tide_kernels.cpu import jit, launch
from tide_kernels.layer_vectors import TILE_OUTPUTS, multiply_tile

MAX_ROWS_AT_ONCE = 4
"""Rows that share what is read; their sums fill half of the vector registers."""


def few_rows_linear(rows: Tensor, tiles: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight.T + bias``.

    Args:
        rows: bfloat16 ``[..., K]``; K is even.
        tiles: bfloat16 ``[M / 64, K / 2, 64, 2]``, contiguous: ``weight[64 t + j, 2 k + p]`` at ``[t, k, j, p]``.
        bias: bfloat16 ``[M]`` or None.

    Returns:
        bfloat16 ``[..., M]``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(rows, tiles, bias)
    rows = rows.contiguous()
    num_tiles, num_pairs = tiles.shape[:2]
    out = rows.new_empty((*rows.shape[:-1], num_tiles * TILE_OUTPUTS))
    num_rows = rows.numel() // (2 * num_pairs)
    bias_address = 0 if bias is None else bias.data_ptr()
    addresses = rows.data_ptr(), tiles.data_ptr(), bias_address, out.data_ptr()
    launch(_multiply, *addresses, num_rows, num_pairs, num_tiles)
    return out


def few_rows_linear_reference(rows: Tensor, tiles: Tensor, bias: Tensor | None) -> Tensor:
    """``few_rows_linear`` in torch."""
    _check(rows, tiles, bias)
    weight = tiles.permute(0, 2, 1, 3).reshape(-1, rows.shape[-1])
    out = rows.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(rows.dtype)


def _check(rows: Tensor, tiles: Tensor, bias: Tensor | None) -> None:
    shape = tuple(tiles.shape)
    if tiles.ndim != 4 or shape[2:] != (TILE_OUTPUTS, 2) or 2 * shape[1] != rows.shape[-1]:
        raise ValueError(f"rows {tuple(rows.shape)} do not fit weights of {shape}")
    if bias is not None and bias.shape != (shape[0] * TILE_OUTPUTS,):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weights of {shape}")
    if not tiles.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError("weights and bias must be contiguous")
    for name, tensor in (("rows", rows), ("weights", tiles), ("bias", bias)):
        if tensor is not None and (tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu"):
            raise ValueError(f"{name} must be bfloat16 on a CPU, got {tensor.dtype} on {tensor.device}")


def _compiled() -> Callable[..., None]:
    tile_bytes, row_item = TILE_OUTPUTS * 4, 2

    @jit(parallel=True, nogil=True, boundscheck=False)
    def multiply(rows, tiles, bias, out, num_rows, num_pairs, num_tiles):  # type: ignore[no-untyped-def]
        row_bytes, out_bytes = num_pairs * 2 * row_item, num_tiles * TILE_OUTPUTS * row_item
        for tile in prange(num_tiles):
            weights = tiles + tile * num_pairs * tile_bytes
            shift = bias + tile * TILE_OUTPUTS * row_item if bias != 0 else 0
            for first in range(0, num_rows, MAX_ROWS_AT_ONCE):
                source, target = rows + first * row_bytes, out + first * out_bytes + tile * TILE_OUTPUTS * row_item
                left = num_rows - first
                if left >= 4:
                    multiply_tile(source, weights, shift, target, row_bytes, out_bytes, num_pairs, 4)
                elif left == 3:
                    multiply_tile(source, weights, shift, target, row_bytes, out_bytes, num_pairs, 3)
                elif left == 2:
                    multiply_tile(source, weights, shift, target, row_bytes, out_bytes, num_pairs, 2)
                else:
                    multiply_tile(source, weights, shift, target, row_bytes, out_bytes, num_pairs, 1)

    return multiply


_multiply = _compiled()
