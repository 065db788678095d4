"""A linear layer in bfloat16 that reads oneDNN's packed weights where they lie, also with SiLU of gates at its end.

oneDNN's blocks of 32 or 64 outputs hold, for every pair of inputs, as many pairs of weights, which is what AVX-512's
products of pairs take, and AMX's products of tiles. One kernel for all numbers of rows makes a row's numbers the same
in any batch. ``tiled_linear`` and ``tiled_gate`` are the Numba CPU kernels, ``*_reference`` the same in torch. Sums are
float32 in both, in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numba import prange
from torch import Tensor

from tide_kernels.cpu import jit, launch
from tide_kernels.product_vectors import (
    ADDED,
    GATED,
    PLAIN,
    ROWS_AT_ONCE,
    STRIP_OUTPUTS,
    TILE_PAIRS,
    TILE_ROWS,
    has_tile_products,
    multiply_pairs,
    multiply_tiles,
)
from tide_kernels.silu_mul import silu_mul_reference
from tide_kernels.task_sharing import new_ranges, share_out, take_task

BLOCK_OUTPUTS = 32, 64
"""Widths of oneDNN's blocks: on CPUs with AMX, and on others."""
ITEM_BYTES = 2
PANEL_BYTES = 2**19
"""Of rows that go through all weights together: they stay in the cache next to the cores."""
FEW_ROWS = 4
"""Rows at once by pairs where tiles take all but odd widths: code for each number of rows takes seconds to compile."""


@dataclass(frozen=True, slots=True)
class TiledWeights:
    """``weight[B t + j, 2 k + p]`` at ``tiles[t, k, j, p]``, contiguous ``[M / B, K / 2, B, 2]`` with B one of
    BLOCK_OUTPUTS; the bias ``[M]`` or None."""

    tiles: Tensor
    bias: Tensor | None

    @property
    def num_inputs(self) -> int:
        """Width of the rows that go in."""
        return self.tiles.shape[1] * 2

    @property
    def num_outputs(self) -> int:
        """Width of the rows that come out."""
        return self.tiles.shape[0] * self.tiles.shape[2]

    @property
    def can_gate(self) -> bool:
        """Whether ``tiled_gate`` takes them: gates and values are whole strips."""
        return self.num_outputs % (2 * STRIP_OUTPUTS) == 0

    @property
    def address(self) -> tuple[int, int, int]:
        """Of the tiles and of the bias (0 for none), and B: what kernels take."""
        return self.tiles.data_ptr(), 0 if self.bias is None else self.bias.data_ptr(), self.tiles.shape[2]


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
    return _run(multiply, rows, weights, weights.num_outputs)


def tiled_linear_reference(rows: Tensor, weights: TiledWeights) -> Tensor:
    """``tiled_linear`` in torch."""
    _check(rows, weights)
    weight = weights.tiles.permute(0, 2, 1, 3).reshape(-1, rows.shape[-1])
    out = rows.float() @ weight.float().T
    return (out if weights.bias is None else out + weights.bias.float()).to(rows.dtype)


def tiled_gate(rows: Tensor, weights: TiledWeights) -> Tensor:
    """``silu(gates) * values`` where ``tiled_linear`` gives all gates, then as many values.

    Args:
        rows: bfloat16 ``[..., K]``; K is even.

    Returns:
        bfloat16 ``[..., M / 2]``.

    Raises:
        ValueError: shapes or dtypes do not fit together, or M is no multiple of 64.
    """
    _check(rows, weights)
    if not weights.can_gate:
        raise ValueError(f"gates must be a multiple of {STRIP_OUTPUTS}, got {weights.num_outputs} with their values")
    return _run(multiply_gated, rows, weights, weights.num_outputs // 2)


def tiled_gate_reference(rows: Tensor, weights: TiledWeights) -> Tensor:
    """``tiled_gate`` in torch."""
    return silu_mul_reference(tiled_linear_reference(rows, weights))


def _run(kernel: Callable[..., None], rows: Tensor, weights: TiledWeights, num_outputs: int) -> Tensor:
    rows = rows.contiguous()
    out = rows.new_empty((*rows.shape[:-1], num_outputs))
    num_rows, num_pairs = rows.numel() // weights.num_inputs, weights.num_inputs // 2
    launch(kernel, rows.data_ptr(), weights.address, out.data_ptr(), num_rows, num_pairs, weights.num_outputs)
    return out


def _check(rows: Tensor, weights: TiledWeights) -> None:
    tiles, bias = weights.tiles, weights.bias
    shape = tuple(tiles.shape)
    if tiles.ndim != 4 or shape[2] not in BLOCK_OUTPUTS or shape[3] != 2 or 2 * shape[1] != rows.shape[-1]:
        raise ValueError(f"rows {tuple(rows.shape)} do not fit weights of {shape}")
    if bias is not None and bias.shape != (weights.num_outputs,):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weights of {shape}")
    if not tiles.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError("weights and bias must be contiguous")
    for name, tensor in (("rows", rows), ("weights", tiles), ("bias", bias)):
        if tensor is not None and (tensor.dtype != torch.bfloat16 or tensor.device.type != "cpu"):
            raise ValueError(f"{name} must be bfloat16 on a CPU, got {tensor.dtype} on {tensor.device}")


@functools.cache
def _kernels(*, uses_tiles: bool) -> tuple[Callable[..., None], Callable[..., None], Callable[..., None]]:
    """The kernels over addresses: rows, ``TiledWeights.address``, (what is added,) out, and numbers of rows, pairs of
    inputs and outputs of the weights."""
    at_once = TILE_ROWS if uses_tiles else ROWS_AT_ONCE
    plain, gated, added = (_strip_kernel(ending, uses_tiles=uses_tiles) for ending in (PLAIN, GATED, ADDED))

    @jit(nogil=True)
    def panels_of(num_rows, row_bytes):  # type: ignore[no-untyped-def]
        """Panels of rows, as few as may be, and the rows of each."""
        num_panels = max(1, (num_rows * row_bytes + PANEL_BYTES - 1) // PANEL_BYTES)
        panel = max(1, ((num_rows + num_panels - 1) // num_panels + at_once - 1) // at_once) * at_once
        return (num_rows + panel - 1) // panel, panel

    @jit(nogil=True)
    def part_of(task, num_rows, panel, num_outputs):  # type: ignore[no-untyped-def]
        """First row, end of the rows, first output and the output after its strip, of one task."""
        num_strips = num_outputs // STRIP_OUTPUTS
        first, output = task // num_strips * panel, task % num_strips * STRIP_OUTPUTS
        return first, min(first + panel, num_rows), output, (output + STRIP_OUTPUTS) % num_outputs

    @jit(parallel=True, nogil=True, boundscheck=False)
    def multiply_all(rows, weights, out, num_rows, num_pairs, num_outputs):  # type: ignore[no-untyped-def]
        steps = num_pairs * 2 * ITEM_BYTES, num_outputs * ITEM_BYTES
        num_panels, panel = panels_of(num_rows, steps[0])
        ranges = new_ranges()
        num_workers = share_out(num_panels * (num_outputs // STRIP_OUTPUTS), ranges)
        for worker in prange(num_workers):
            task = take_task(ranges, worker, num_workers)
            while task >= 0:
                first, end, output, following = part_of(task, num_rows, panel, num_outputs)
                target = out + output * ITEM_BYTES
                plain(rows, weights, target, target, steps, first, end, num_pairs, output, following)
                task = take_task(ranges, worker, num_workers)

    @jit(parallel=True, nogil=True, boundscheck=False)
    def multiply_added(rows, weights, addend, out, num_rows, num_pairs, num_outputs):  # type: ignore[no-untyped-def]
        steps = num_pairs * 2 * ITEM_BYTES, num_outputs * ITEM_BYTES
        num_panels, panel = panels_of(num_rows, steps[0])
        ranges = new_ranges()
        num_workers = share_out(num_panels * (num_outputs // STRIP_OUTPUTS), ranges)
        for worker in prange(num_workers):
            task = take_task(ranges, worker, num_workers)
            while task >= 0:
                first, end, output, following = part_of(task, num_rows, panel, num_outputs)
                target, other = out + output * ITEM_BYTES, addend + output * ITEM_BYTES
                added(rows, weights, target, other, steps, first, end, num_pairs, output, following)
                task = take_task(ranges, worker, num_workers)

    @jit(parallel=True, nogil=True, boundscheck=False)
    def multiply_gated(rows, weights, out, num_rows, num_pairs, num_outputs):  # type: ignore[no-untyped-def]
        half = num_outputs // 2
        steps = num_pairs * 2 * ITEM_BYTES, half * ITEM_BYTES
        num_panels, panel = panels_of(num_rows, steps[0])
        ranges = new_ranges()
        num_workers = share_out(num_panels * (half // STRIP_OUTPUTS), ranges)
        for worker in prange(num_workers):
            task = take_task(ranges, worker, num_workers)
            while task >= 0:
                first, end, output, following = part_of(task, num_rows, panel, half)
                target = out + output * ITEM_BYTES
                plain(rows, weights, target, target, steps, first, end, num_pairs, output, half + output)
                gated(rows, weights, target, target, steps, first, end, num_pairs, half + output, following)
                task = take_task(ranges, worker, num_workers)

    return multiply_all, multiply_added, multiply_gated


def _strip_kernel(ending: int, *, uses_tiles: bool) -> Callable[..., None]:
    """Rows ``first`` to ``end`` times one strip of outputs; ``target`` and ``other`` are places in the first of all
    rows, ``following`` is the output whose weights are read next."""
    pairs_at_once = FEW_ROWS if uses_tiles else ROWS_AT_ONCE

    @jit(nogil=True)
    def places_of(weights, output, num_pairs):  # type: ignore[no-untyped-def]
        """Addresses of an output's first pair of weights and of its bias (0 for none)."""
        tiles, bias, width = weights
        strip = tiles + (output // width * num_pairs * width + output % width) * 2 * ITEM_BYTES
        return strip, bias + output * ITEM_BYTES if bias != 0 else 0

    @jit(nogil=True, boundscheck=False)
    def in_pairs(rows, weights, target, other, steps, first, end, num_pairs, output, _following):  # type: ignore[no-untyped-def]
        strip, shifts = places_of(weights, output, num_pairs)
        all_steps = steps[0], steps[1], weights[2] * 2 * ITEM_BYTES
        for row in range(first, end, pairs_at_once):
            source, down, count = rows + row * steps[0], row * steps[1], min(end - row, pairs_at_once)
            multiply_pairs(
                source, strip, shifts, target + down, other + down, all_steps, num_pairs, count, pairs_at_once, ending
            )

    if not uses_tiles:
        return in_pairs

    @jit(nogil=True, boundscheck=False)
    def in_tiles(rows, weights, target, other, steps, first, end, num_pairs, output, following):  # type: ignore[no-untyped-def]
        if num_pairs % TILE_PAIRS != 0:
            in_pairs(rows, weights, target, other, steps, first, end, num_pairs, output, following)
            return
        strip, shifts = places_of(weights, output, num_pairs)
        ahead, _ = places_of(weights, following, num_pairs)
        all_steps = steps[0], steps[1], weights[2] * 2 * ITEM_BYTES
        source, down = rows + first * steps[0], first * steps[1]
        multiply_tiles(
            source, strip, shifts, target + down, other + down, all_steps, num_pairs, end - first, ahead, ending
        )

    return in_tiles


multiply, multiply_added, multiply_gated = _kernels(uses_tiles=has_tile_products())
