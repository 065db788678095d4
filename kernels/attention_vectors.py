"""Vector code of decode attention: scores, weighted sums and the running softmax.

Sixteen dot products share one tree of sums, and what is loaded serves a group of query rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from tide_kernels.vectors import (
    FLOAT,
    MAX_LANES,
    MAY_FUSE,
    code_for_constants,
    load,
    load_everywhere,
    multiply_add,
    prefetch,
    store,
    sum_lanes,
    values_of,
)

MAX_TOKENS = 16
LOG2_E, LN2_PARTS = 1.44269504088896341, (0.693359375, -2.12194440e-4)
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def lanes_for(width: int) -> int:
    """Lanes of the vectors that rows of ``width`` numbers are cut into."""
    return math.gcd(width, MAX_LANES)


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

    Addresses of float32, of a single one for ``top``. Below -87 it gives exp(-87), about 1e-38. exp(x) = 2^n exp(r)
    with Cephes' single-precision polynomial (expf.c), good to 2 ulp.
    """
    lanes = num.literal_value
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)

    def constant(value: float) -> Any:
        return ir.Constant(floats, [float(np.float32(value))] * lanes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        number_address, sum_address, top_address = arguments[:3]
        x = builder.fsub(load(builder, number_address, 0, lanes), load_everywhere(builder, top_address, 0, lanes))
        x = builder.select(builder.fcmp_ordered("<", x, constant(-87.0)), constant(-87.0), x)
        n = builder.fptosi(builder.fadd(builder.fmul(x, constant(LOG2_E)), constant(-0.5)), ints)
        z = builder.sitofp(n, floats)
        for part in LN2_PARTS:
            x = multiply_add(builder, z, constant(-part), x)
        y = constant(EXP_POLYNOMIAL[0])
        for coefficient in EXP_POLYNOMIAL[1:]:
            y = multiply_add(builder, y, x, constant(coefficient))
        y = builder.fadd(multiply_add(builder, builder.fmul(y, x), x, x), constant(1.0))
        power = builder.shl(builder.add(n, ir.Constant(ints, [127] * lanes)), ir.Constant(ints, [23] * lanes))
        result = builder.fmul(y, builder.bitcast(power, floats))
        store(builder, number_address, 0, result)
        store(builder, sum_address, 0, builder.fadd(load(builder, sum_address, 0, lanes), result))
        return context.get_dummy_value()

    return types.void(numbers, sums, top, num), codegen
