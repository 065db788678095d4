"""Vector code of decode attention: scores, weighted sums and the running softmax.

Sixteen dot products share one tree of sums, and what is loaded serves a group of query rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types

from tide_kernels.vectors import (
    MAY_FUSE,
    code_for_constants,
    exponential,
    in_every_lane,
    lanes_for,
    load,
    load_everywhere,
    multiply_add,
    prefetch,
    store,
    store_as,
    sum_lanes,
    values_of,
)

MAX_TOKENS = 16


def tokens_for(page_size: int) -> int:
    """Tokens that are handled together: a power of two that divides the page."""
    return math.gcd(page_size, MAX_TOKENS)


def rows_for(group: int) -> int:
    """Query rows of a group that share what is loaded: its largest divisor up to 4, which still fits registers."""
    return max(rows for rows in range(1, 5) if group % rows == 0)


@code_for_constants
def score_tokens(_context, queries, keys, ahead, scores, stride, head_dim, num_rows, num_tokens, item_bytes):  # type: ignore[no-untyped-def]
    """Dot products of ``num_rows`` query rows with ``num_tokens`` keys.

    Args:
        queries, keys, scores: addresses of float32 ``[num_rows, head_dim]``, of ``[num_tokens, head_dim]`` and of the
            first score.
        ahead: address of what is needed next; as many bytes as the keys have are asked for meanwhile. It may be any.
        stride: bytes from one row's scores to the next row's.
        head_dim, num_rows, num_tokens: constants.
        item_bytes: constant; 2 for keys in bfloat16, 4 for float32.
    """
    width, rows, tokens, size = values_of(head_dim, num_rows, num_tokens, item_bytes)
    lanes = lanes_for(width)
    chunks = range(width // lanes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        query_address, key_address, ahead_address, score_address, step = arguments[:5]
        query = [[load(builder, query_address, r * width + c * lanes, lanes) for c in chunks] for r in range(rows)]
        sums: list[list[Any]] = [[] for _ in range(rows)]
        for token in range(tokens):
            prefetch(builder, ahead_address, token * width * size, width * size)
            key = [load(builder, key_address, token * width + c * lanes, lanes, size) for c in chunks]
            for row in range(rows):
                total = builder.fmul(query[row][0], key[0], flags=MAY_FUSE)
                for c in chunks[1:]:
                    total = multiply_add(builder, query[row][c], key[c], total)
                sums[row].append(total)
        for row in range(rows):
            address = builder.add(score_address, builder.mul(step, step.type(row)))
            store(builder, address, 0, sum_lanes(builder, sums[row], lanes))
        return context.get_dummy_value()

    arguments = (queries, keys, ahead, scores, stride, head_dim, num_rows, num_tokens, item_bytes)
    return types.void(*arguments), codegen


@code_for_constants
def add_weighted_tokens(_context, sums, values, ahead, weights, stride, head_dim, num_rows, num_tokens, item_bytes):  # type: ignore[no-untyped-def]
    """Add ``num_tokens`` values to ``num_rows`` sums, each times the row's weight for that token.

    Args:
        sums, values, weights: addresses of float32 ``[num_rows, head_dim]``, of ``[num_tokens, head_dim]`` and of the
            first weight.
        ahead: as in ``score_tokens``, by the values' bytes.
        stride: bytes from one row's weights to the next row's.
        head_dim, num_rows, num_tokens, item_bytes: constants, as in ``score_tokens``.
    """
    width, rows, tokens, size = values_of(head_dim, num_rows, num_tokens, item_bytes)
    lanes = lanes_for(width)
    chunks = range(width // lanes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        sum_address, value_address, ahead_address, weight_address, step = arguments[:5]
        totals = [[load(builder, sum_address, r * width + c * lanes, lanes) for c in chunks] for r in range(rows)]
        starts = [builder.add(weight_address, builder.mul(step, step.type(row))) for row in range(rows)]
        for token in range(tokens):
            prefetch(builder, ahead_address, token * width * size, width * size)
            weight = [load_everywhere(builder, start, token, lanes) for start in starts]
            for c in chunks:
                value = load(builder, value_address, token * width + c * lanes, lanes, size)
                for row in range(rows):
                    totals[row][c] = multiply_add(builder, weight[row], value, totals[row][c])
        for row in range(rows):
            for c in chunks:
                store(builder, sum_address, row * width + c * lanes, totals[row][c])
        return context.get_dummy_value()

    arguments = (sums, values, ahead, weights, stride, head_dim, num_rows, num_tokens, item_bytes)
    return types.void(*arguments), codegen


@code_for_constants
def raise_to(_context, maxima, numbers, num):  # type: ignore[no-untyped-def]
    """Raise ``num`` (a constant) maxima to as many numbers where those are larger. Addresses of float32."""
    lanes = num.literal_value

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        old, new = (load(builder, address, 0, lanes) for address in arguments[:2])
        store(builder, arguments[0], 0, builder.select(builder.fcmp_ordered(">", new, old), new, old))
        return context.get_dummy_value()

    return types.void(maxima, numbers, num), codegen


@code_for_constants
def exponentiate(_context, numbers, sums, top, num):  # type: ignore[no-untyped-def]
    """Put exp(x - top) in the place of ``num`` (a constant) numbers x <= top, and add them to as many sums.

    Addresses of float32, of a single one for ``top``. Below -87 it gives exp(-87), about 1e-38.
    """
    lanes = num.literal_value

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        number_address, sum_address, top_address = arguments[:3]
        x = builder.fsub(load(builder, number_address, 0, lanes), load_everywhere(builder, top_address, 0, lanes))
        result = exponential(builder, x, lanes)
        store(builder, number_address, 0, result)
        store(builder, sum_address, 0, builder.fadd(load(builder, sum_address, 0, lanes), result))
        return context.get_dummy_value()

    return types.void(numbers, sums, top, num), codegen


@code_for_constants
def scale_queries(_context, rows, scaled, factor, num, item_bytes):  # type: ignore[no-untyped-def]
    """``num`` numbers times a factor, into float32; ``num`` and ``item_bytes`` are constants."""
    width, size = values_of(num, item_bytes)
    lanes = lanes_for(width)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        source, target, value = arguments[:3]
        factors = in_every_lane(builder, value, lanes)
        for first in range(0, width, lanes):
            store(builder, target, first, builder.fmul(load(builder, source, first, lanes, size), factors))
        return context.get_dummy_value()

    return types.void(rows, scaled, factor, num, item_bytes), codegen


@code_for_constants
def store_scaled(_context, sums, out, factor, num, item_bytes):  # type: ignore[no-untyped-def]
    """``num`` float32 times a factor, in the dtype of the output; ``num`` and ``item_bytes`` are constants."""
    width, size = values_of(num, item_bytes)
    lanes = lanes_for(width)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        source, target, value = arguments[:3]
        factors = in_every_lane(builder, value, lanes)
        for first in range(0, width, lanes):
            store_as(builder, target, first, builder.fmul(load(builder, source, first, lanes), factors), size)
        return context.get_dummy_value()

    return types.void(sums, out, factor, num, item_bytes), codegen
