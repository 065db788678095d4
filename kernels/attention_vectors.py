"""Vector code of decode attention: scores, softmax and weighted sums of one K/V head for a group of query rows.

Sixteen dot products share one tree of sums, and what is loaded serves several rows. Where the CPU multiplies pairs of
bfloat16, K and V are taken as they lie, and weights are rounded to bfloat16, as transformers' attention does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tide_kernels.vectors import (
    FLOAT,
    MAX_LANES,
    MAY_FUSE,
    add_pair_products,
    code_for_constants,
    each_vector,
    exponential,
    in_every_lane,
    lanes_for,
    load,
    load_everywhere,
    multiply_add,
    pointer,
    prefetch,
    shuffle,
    store,
    store_as,
    sum_lanes,
    values_of,
)

MAX_TOKENS = 16
PAIR_WIDTH = 2 * MAX_LANES
MAX_SUMS = 24
INFINITY = float("inf")


def tokens_for(page_size: int) -> int:
    """Tokens that are handled together: a power of two that divides the page."""
    return math.gcd(page_size, MAX_TOKENS)


def rows_for(group: int, head_dim: int) -> int:
    """Query rows of a group that share what is loaded: its largest divisor up to 4 whose sums still fit registers."""
    most = max(1, MAX_SUMS * MAX_LANES // max(head_dim, MAX_LANES))
    return max(rows for rows in range(1, min(4, most) + 1) if group % rows == 0)


@code_for_constants
def score_tokens(_context, queries, keys, ahead, scores, stride, head_dim, num_rows, num_tokens, item_bytes):  # type: ignore[no-untyped-def]
    """Dot products of ``num_rows`` query rows with ``num_tokens`` keys.

    Args:
        queries, keys, scores: addresses of ``[num_rows, head_dim]`` and ``[num_tokens, head_dim]`` of one dtype, and of
            the first score (float32).
        ahead: address of what is needed next; as many bytes as the keys have are asked for meanwhile. It may be any.
        stride: bytes from one row's scores to the next row's.
        head_dim, num_rows, num_tokens: constants.
        item_bytes: constant; 2 for bfloat16, 4 for float32.
    """
    width, rows, tokens, size = values_of(head_dim, num_rows, num_tokens, item_bytes)
    lanes = lanes_for(width)
    chunks = range(width // lanes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        query_address, key_address, ahead_address, score_address, step = arguments[:5]
        query = [
            [load(builder, query_address, r * width + c * lanes, lanes, size) for c in chunks] for r in range(rows)
        ]
        sums: list[list[Any]] = [[] for _ in range(rows)]
        for token in range(tokens):
            prefetch(builder, ahead_address, token * width * size, width * size)
            key = [load(builder, key_address, token * width + c * lanes, lanes, size) for c in chunks]
            for row in range(rows):
                total = builder.fmul(query[row][0], key[0], flags=MAY_FUSE)
                for c in chunks[1:]:
                    total = multiply_add(builder, query[row][c], key[c], total)
                sums[row].append(total)
        _store_sums(builder, score_address, step, sums, lanes)
        return context.get_dummy_value()

    arguments = (queries, keys, ahead, scores, stride, head_dim, num_rows, num_tokens, item_bytes)
    return types.void(*arguments), codegen


@code_for_constants
def score_pairs(_context, queries, keys, ahead, scores, stride, head_dim, num_rows, num_tokens, item_bytes):  # type: ignore[no-untyped-def]
    """``score_tokens`` of bfloat16 by products of pairs; ``head_dim`` is a multiple of PAIR_WIDTH."""
    width, rows, tokens, size = values_of(head_dim, num_rows, num_tokens, item_bytes)
    chunks = range(width // PAIR_WIDTH)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        query_address, key_address, ahead_address, score_address, step = arguments[:5]
        query = [[_pairs(builder, query_address, r * width + c * PAIR_WIDTH) for c in chunks] for r in range(rows)]
        zeros = ir.Constant(ir.VectorType(FLOAT, MAX_LANES), None)
        sums: list[list[Any]] = [[] for _ in range(rows)]
        for token in range(tokens):
            prefetch(builder, ahead_address, token * width * size, width * size)
            key = [_pairs(builder, key_address, token * width + c * PAIR_WIDTH) for c in chunks]
            for row in range(rows):
                total = zeros
                for c in chunks:
                    total = add_pair_products(builder, total, query[row][c], key[c])
                sums[row].append(total)
        _store_sums(builder, score_address, step, sums, MAX_LANES)
        return context.get_dummy_value()

    arguments = (queries, keys, ahead, scores, stride, head_dim, num_rows, num_tokens, item_bytes)
    return types.void(*arguments), codegen


def _pairs(builder: ir.IRBuilder, address: Any, number: int) -> Any:
    """PAIR_WIDTH bfloat16 from the ``number``-th on, as 32-bit patterns of two."""
    return builder.load(pointer(builder, address, number * 2, ir.VectorType(ir.IntType(32), MAX_LANES)), align=2)


def _store_sums(builder: ir.IRBuilder, address: Any, step: Any, sums: list[list[Any]], lanes: int) -> None:
    for row, vectors in enumerate(sums):
        start = builder.add(address, builder.mul(step, step.type(row)))
        store(builder, start, 0, sum_lanes(builder, vectors, lanes))


@code_for_constants
def softmax_weights(_context, scores, num_vectors, scale, packs):  # type: ignore[no-untyped-def]
    """Put ``exp(scale * (x - max))`` in the place of ``MAX_LANES * num_vectors`` float32 scores; returns their sum.

    With ``packs``, a constant, they are stored as bfloat16, one after another, from the first score's address on. A
    score of minus infinity gives about 1e-38.
    """
    (is_packed,) = values_of(packs)
    kind = ir.VectorType(FLOAT, MAX_LANES)

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        address, num, factor = arguments[:3]
        tops = cgutils.alloca_once_value(builder, ir.Constant(kind, [-INFINITY] * MAX_LANES))
        with each_vector(builder, num, 4) as offset:
            x, top = load(builder, builder.add(address, offset), 0, MAX_LANES), builder.load(tops)
            builder.store(builder.select(builder.fcmp_ordered(">", x, top), x, top), tops)
        top = builder.load(tops)
        for distance in (8, 4, 2, 1):
            other = shuffle(builder, top, top, [lane ^ distance for lane in range(MAX_LANES)])
            top = builder.select(builder.fcmp_ordered(">", other, top), other, top)
        factors = in_every_lane(builder, factor, MAX_LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(kind, None))
        with each_vector(builder, num, 4) as offset:
            x = builder.fsub(load(builder, builder.add(address, offset), 0, MAX_LANES), top)
            weights = exponential(builder, builder.fmul(x, factors), MAX_LANES)
            builder.store(builder.fadd(builder.load(total), weights), total)
            if is_packed:
                half = builder.add(address, builder.lshr(offset, offset.type(1)))
                store_as(builder, half, 0, weights, 2)
            else:
                store(builder, builder.add(address, offset), 0, weights)
        return builder.extract_element(sum_lanes(builder, [builder.load(total)], MAX_LANES), ir.IntType(32)(0))

    return types.float32(scores, num_vectors, scale, packs), codegen


@code_for_constants
def add_weighted_tokens(_context, sums, values, ahead, weights, stride, head_dim, num_rows, num_tokens, item_bytes):  # type: ignore[no-untyped-def]
    """Add ``num_tokens`` values to ``num_rows`` sums, each times the row's weight for that token.

    Args:
        sums, values, weights: addresses of float32 ``[num_rows, head_dim]``, of ``[num_tokens, head_dim]`` and of the
            first weight (float32).
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
def add_weighted_pairs(_context, sums, values, second, ahead, weights, stride, head_dim, num_rows, num_pairs):  # type: ignore[no-untyped-def]
    """``add_weighted_tokens`` of ``num_pairs`` pairs of tokens, values and weights in bfloat16.

    ``values`` and ``second`` are the addresses of the first pair's tokens; further pairs lie two rows further on.
    """
    width, rows, pairs = values_of(head_dim, num_rows, num_pairs)
    chunks = range(width // PAIR_WIDTH)
    lower = [n // 2 + n % 2 * PAIR_WIDTH for n in range(PAIR_WIDTH)]

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        sum_address, value_address, second_address, ahead_address, weight_address, step = arguments[:6]
        halves = ir.VectorType(ir.IntType(16), PAIR_WIDTH)
        words = ir.VectorType(ir.IntType(32), MAX_LANES)
        vectors = range(2 * len(chunks))
        totals = [
            [load(builder, sum_address, r * width + v * MAX_LANES, MAX_LANES) for v in vectors] for r in range(rows)
        ]
        starts = [builder.add(weight_address, builder.mul(step, step.type(row))) for row in range(rows)]
        for pair in range(pairs):
            prefetch(builder, ahead_address, 2 * pair * width * 2, 2 * width * 2)
            weight = []
            for start in starts:
                both = builder.load(pointer(builder, start, pair * 4, ir.IntType(32)), align=2)
                weight.append(in_every_lane(builder, both, MAX_LANES))
            for c in chunks:
                place = 2 * pair * width + c * PAIR_WIDTH
                a, b = (
                    builder.load(pointer(builder, address, place * 2, halves), align=2)
                    for address in (value_address, second_address)
                )
                for half in range(2):
                    value = shuffle(builder, a, b, [lane + half * MAX_LANES for lane in lower])
                    value = builder.bitcast(value, words)
                    for row in range(rows):
                        total = totals[row][2 * c + half]
                        totals[row][2 * c + half] = add_pair_products(builder, total, weight[row], value)
        for row in range(rows):
            for v in vectors:
                store(builder, sum_address, row * width + v * MAX_LANES, totals[row][v])
        return context.get_dummy_value()

    arguments = (sums, values, second, ahead, weights, stride, head_dim, num_rows, num_pairs)
    return types.void(*arguments), codegen


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
