"""Vector code of layers around attention, in bfloat16: products with packed weights, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tide_kernels.vectors import (
    FLOAT,
    MAX_LANES,
    code_for_constants,
    in_every_lane,
    load,
    multiply_add,
    pointer,
    round_to_bfloat16,
    store_rounded,
    sum_lanes,
    values_of,
)

TILE_OUTPUTS = 64


@code_for_constants
def multiply_tile(_context, rows, weights, bias, out, row_bytes, out_bytes, num_pairs, num_rows):  # type: ignore[no-untyped-def]
    """Products of ``num_rows`` rows with a tile of TILE_OUTPUTS outputs, rounded to bfloat16 once.

    Args:
        rows, weights, out: addresses of bfloat16 ``[num_rows, 2 num_pairs]``, of ``[num_pairs, TILE_OUTPUTS, 2]`` and
            of the tile's outputs for the first row.
        bias: address of bfloat16 ``[TILE_OUTPUTS]``; 0 for none.
        row_bytes, out_bytes: from one row to the next, of ``rows`` and ``out``.
        num_pairs: pairs of inputs.
        num_rows: constant.
    """
    (count,) = values_of(num_rows)
    lanes = MAX_LANES
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
    vectors = range(TILE_OUTPUTS // lanes)

    def ints_of(value: int) -> Any:
        return ir.Constant(ints, [value] * lanes)

    def both(builder: ir.IRBuilder, pairs: Any) -> list[Any]:
        """The lower and the upper bfloat16 of each 32-bit pair, as float32."""
        parts = builder.shl(pairs, ints_of(16)), builder.and_(pairs, ints_of(0xFFFF0000))
        return [builder.bitcast(part, floats) for part in parts]

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        row_address, weight_address, bias_address, out_address, row_step, out_step, pairs = arguments[:7]
        sums = [[cgutils.alloca_once_value(builder, ir.Constant(floats, None)) for _ in vectors] for _ in range(count)]
        with cgutils.for_range(builder, pairs) as loop:
            at = builder.add(weight_address, builder.mul(loop.index, loop.index.type(TILE_OUTPUTS * 4)))
            inputs = []
            for row in range(count):
                start = builder.add(row_address, builder.mul(row_step, row_step.type(row)))
                place = builder.add(start, builder.mul(loop.index, loop.index.type(4)))
                pair = builder.load(pointer(builder, place, 0, ir.IntType(32)), align=4)
                inputs.append(both(builder, in_every_lane(builder, pair, lanes)))
            for vector in vectors:
                weight = builder.load(pointer(builder, at, vector * lanes * 4, ints), align=4)
                for half, part in enumerate(both(builder, weight)):
                    for row in range(count):
                        total = builder.load(sums[row][vector])
                        builder.store(multiply_add(builder, inputs[row][half], part, total), sums[row][vector])
        has_bias = builder.icmp_unsigned("!=", bias_address, bias_address.type(0))
        with builder.if_then(has_bias):
            for vector in vectors:
                shift = load(builder, bias_address, vector * lanes, lanes, 2)
                for row in range(count):
                    builder.store(builder.fadd(builder.load(sums[row][vector]), shift), sums[row][vector])
        for row in range(count):
            target = builder.add(out_address, builder.mul(out_step, out_step.type(row)))
            for vector in vectors:
                store_rounded(
                    builder, target, vector * lanes, round_to_bfloat16(builder, builder.load(sums[row][vector]), lanes)
                )
        return context.get_dummy_value()

    arguments = (rows, weights, bias, out, row_bytes, out_bytes, num_pairs, num_rows)
    return types.void(*arguments), codegen


@code_for_constants
def sum_of_squares(_context, numbers, num_vectors):  # type: ignore[no-untyped-def]
    """The sum of the squares of ``MAX_LANES * num_vectors`` bfloat16 numbers at an address, as float32."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        address, num = arguments
        total = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(FLOAT, MAX_LANES), None))
        with cgutils.for_range(builder, num) as loop:
            at = builder.add(address, builder.mul(loop.index, loop.index.type(MAX_LANES * 2)))
            x = load(builder, at, 0, MAX_LANES, 2)
            builder.store(multiply_add(builder, x, x, builder.load(total)), total)
        lanes = sum_lanes(builder, [builder.load(total)], MAX_LANES)
        return builder.extract_element(lanes, ir.IntType(32)(0))

    return types.float32(numbers, num_vectors), codegen


@code_for_constants
def scale_twice(_context, numbers, weights, out, num_vectors, factor):  # type: ignore[no-untyped-def]
    """``weights * (numbers * factor)``, rounded to bfloat16 after each product; addresses of bfloat16, a float32."""

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        number_address, weight_address, out_address, num, value = arguments
        kind = ir.VectorType(FLOAT, MAX_LANES)
        everywhere = in_every_lane(builder, value, MAX_LANES)
        with cgutils.for_range(builder, num) as loop:
            step = builder.mul(loop.index, loop.index.type(MAX_LANES * 2))
            x, weight = (
                load(builder, builder.add(start, step), 0, MAX_LANES, 2) for start in (number_address, weight_address)
            )
            bits = round_to_bfloat16(builder, builder.fmul(x, everywhere), MAX_LANES)
            scaled = builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * MAX_LANES)), kind)
            place = builder.add(out_address, step)
            store_rounded(builder, place, 0, round_to_bfloat16(builder, builder.fmul(scaled, weight), MAX_LANES))
        return context.get_dummy_value()

    return types.void(numbers, weights, out, num_vectors, factor), codegen
