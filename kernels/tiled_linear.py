"""A linear layer in bfloat16 that reads oneDNN's packed weights where they lie, for the rows of a decode step.

oneDNN's products are made for many rows; with fewer, much of their time is not spent on weights or products. Its blocks
of 64 outputs hold, for every pair of inputs, 64 pairs of weights, which is what AVX-512's products of pairs take.
``tiled_linear`` is the Numba CPU kernel, ``tiled_linear_reference`` the same in torch. Sums are float32 in both, in
another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numba import prange
from torch import Tensor

from tide_kernels.cpu import jit, launch
from tide_kernels.layer_vectors import STRIP_OUTPUTS, TILE_OUTPUTS, multiply_strip
from tide_kernels.vectors import has_pair_products

ROWS_AT_ONCE = 12 if has_pair_products() else 4
"""Rows that share what is read of the weights: their sums, and what is multiplied, fit the vector registers."""
STRIPS = TILE_OUTPUTS // STRIP_OUTPUTS
ITEM_BYTES = 2


@dataclass(frozen=True, slots=True)
class TiledWeights:
    """``weight[64 t + j, 2 k + p]`` at ``tiles[t, k, j, p]``, contiguous ``[M / 64, K / 2, 64, 2]``; the bias ``[M]``
    or None."""

    tiles: Tensor
    bias: Tensor | None

    @property
    def num_inputs(self) -> int:
        return self.tiles.shape[1] * 2

    @property
    def num_outputs(self) -> int:
        return self.tiles.shape[0] * TILE_OUTPUTS

    @property
    def addresses(self) -> tuple[int, int]:
        return self.tiles.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()


def tiled_linear(rows: Tensor, weights: TiledWeights) -> Tensor:
    """``rows @ weight.T + bias``.

    Args:
        rows: bfloat16 ``[..., K]``; K is even.

    Returns:
        bfloat16 ``[..., M]``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(rows, weights)
    rows = rows.contiguous()
    out = rows.new_empty((*rows.shape[:-1], weights.num_outputs))
    num_rows, num_tiles, num_pairs = rows.numel() // weights.num_inputs, *weights.tiles.shape[:2]
    launch(multiply, rows.data_ptr(), *weights.addresses, out.data_ptr(), num_rows, num_pairs, num_tiles)
    return out


def tiled_linear_reference(rows: Tensor, weights: TiledWeights) -> Tensor:
    """``tiled_linear`` in torch."""
    _check(rows, weights)
    weight = weights.tiles.permute(0, 2, 1, 3).reshape(-1, rows.shape[-1])
    out = rows.float() @ weight.float().T
    return (out if weights.bias is None else out + weights.bias.float()).to(rows.dtype)


def _check(rows: Tensor, weights: TiledWeights) -> None:
    tiles, bias = weights.tiles, weights.bias
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


@jit(parallel=True, nogil=True, boundscheck=False)
def multiply(rows, tiles, bias, out, num_rows, num_pairs, num_tiles):  # type: ignore[no-untyped-def]
    """The kernel over addresses."""
    row_bytes, out_bytes = num_pairs * 2 * ITEM_BYTES, num_tiles * TILE_OUTPUTS * ITEM_BYTES
    for strip in prange(num_tiles * STRIPS):
        first_output = strip * STRIP_OUTPUTS
        weights = tiles + (strip // STRIPS * num_pairs * TILE_OUTPUTS + strip % STRIPS * STRIP_OUTPUTS) * 4
        shift = bias + first_output * ITEM_BYTES if bias != 0 else 0
        for first in range(0, num_rows, ROWS_AT_ONCE):
            source, target = rows + first * row_bytes, out + first * out_bytes + first_output * ITEM_BYTES
            at_once = min(num_rows - first, ROWS_AT_ONCE)
            multiply_strip(source, weights, shift, target, row_bytes, out_bytes, num_pairs, at_once, ROWS_AT_ONCE)
