"""Vector code of layers around attention: products with packed bfloat16 weights, norms, rotary, SiLU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tide_kernels.vectors import (
    FLOAT,
    MAX_LANES,
    add_pair_products,
    code_for_constants,
    each_vector,
    exponential,
    in_every_lane,
    lanes_for,
    load,
    multiply_add,
    pointer,
    prefetch,
    rounded,
    store_as,
    sum_lanes,
    values_of,
)

TILE_OUTPUTS, STRIP_OUTPUTS = 64, 32
PAIRS_AHEAD = 32


@code_for_constants
def multiply_strip(_context, rows, weights, bias, out, row_bytes, out_bytes, num_pairs, num_rows, most):  # type: ignore[no-untyped-def]
    """Products of ``num_rows`` rows with STRIP_OUTPUTS outputs of a tile, rounded to bfloat16 once.

    Args:
        rows, weights, out: addresses of bfloat16 ``[num_rows, 2 num_pairs]``, of the strip in the tile's
            ``[num_pairs, TILE_OUTPUTS, 2]`` and of the strip's outputs for the first row.
        bias: address of bfloat16 ``[STRIP_OUTPUTS]``; 0 for none.
        row_bytes, out_bytes: from one row to the next, of ``rows`` and ``out``.
        num_pairs: pairs of inputs.
        num_rows: from 1 to ``most``, a constant; there is straight-line code for each number.
    """
    (limit,) = values_of(most)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        done = builder.append_basic_block("multiplied")
        choice = builder.switch(arguments[7], done)
        for count in range(1, limit + 1):
            block = builder.append_basic_block(f"rows_{count}")
            choice.add_case(arguments[7].type(count), block)
            builder.position_at_end(block)
            _multiply_rows(builder, count, arguments[:7])
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    arguments = (rows, weights, bias, out, row_bytes, out_bytes, num_pairs, types.int64, most)
    return types.void(*arguments), codegen


def _multiply_rows(builder: ir.IRBuilder, count: int, arguments: Sequence[Any]) -> None:
    row_address, weight_address, bias_address, out_address, row_step, out_step, pairs = arguments
    lanes = MAX_LANES
    floats, ints = ir.VectorType(FLOAT, lanes), ir.VectorType(ir.IntType(32), lanes)
    vectors = range(STRIP_OUTPUTS // lanes)
    sums = [[cgutils.alloca_once(builder, floats) for _ in vectors] for _ in range(count)]
    for total in itertools.chain(*sums):
        builder.store(ir.Constant(floats, None), total)
    with cgutils.for_range(builder, pairs) as loop:
        at = builder.add(weight_address, builder.mul(loop.index, loop.index.type(TILE_OUTPUTS * 4)))
        # The hardware foresees little of a strip, of which every tile's row holds 128 of 256 bytes.
        prefetch(builder, at, PAIRS_AHEAD * TILE_OUTPUTS * 4, STRIP_OUTPUTS * 4)
        weight = [builder.load(pointer(builder, at, v * lanes * 4, ints), align=4) for v in vectors]
        for row in range(count):
            start = builder.add(row_address, builder.mul(row_step, row_step.type(row)))
            place = builder.add(start, builder.mul(loop.index, loop.index.type(4)))
            pair = builder.load(pointer(builder, place, 0, ir.IntType(32)), align=4)
            inputs = in_every_lane(builder, pair, lanes)
            for vector in vectors:
                total = builder.load(sums[row][vector])
                builder.store(add_pair_products(builder, total, inputs, weight[vector]), sums[row][vector])
    with builder.if_then(builder.icmp_unsigned("!=", bias_address, bias_address.type(0))):
        for vector in vectors:
            shift = load(builder, bias_address, vector * lanes, lanes, 2)
            for row in range(count):
                builder.store(builder.fadd(builder.load(sums[row][vector]), shift), sums[row][vector])
    for row in range(count):
        target = builder.add(out_address, builder.mul(out_step, out_step.type(row)))
        for vector in vectors:
            store_as(builder, target, vector * lanes, builder.load(sums[row][vector]), 2)


@code_for_constants
def sum_of_squares(_context, numbers, num_vectors, item_bytes):  # type: ignore[no-untyped-def]
    """The sum of the squares of ``MAX_LANES * num_vectors`` numbers at an address, as float32."""
    (size,) = values_of(item_bytes)

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        address, num = arguments[:2]
        total = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(FLOAT, MAX_LANES), None))
        with each_vector(builder, num, size) as offset:
            x = load(builder, builder.add(address, offset), 0, MAX_LANES, size)
            builder.store(multiply_add(builder, x, x, builder.load(total)), total)
        lanes = sum_lanes(builder, [builder.load(total)], MAX_LANES)
        return builder.extract_element(lanes, ir.IntType(32)(0))

    return types.float32(numbers, num_vectors, item_bytes), codegen


@code_for_constants
def scale_twice(_context, numbers, weights, out, num_vectors, factor, item_bytes):  # type: ignore[no-untyped-def]
    """``weights * (numbers * factor)``, rounded to the dtype after each product; addresses, and a float32."""
    (size,) = values_of(item_bytes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        number_address, weight_address, out_address, num, value = arguments[:5]
        everywhere = in_every_lane(builder, value, MAX_LANES)
        with each_vector(builder, num, size) as offset:
            x = load(builder, builder.add(number_address, offset), 0, MAX_LANES, size)
            weight = load(builder, builder.add(weight_address, offset), 0, MAX_LANES, size)
            scaled = rounded(builder, builder.fmul(x, everywhere), MAX_LANES, size)
            store_as(builder, builder.add(out_address, offset), 0, builder.fmul(scaled, weight), size)
        return context.get_dummy_value()

    return types.void(numbers, weights, out, num_vectors, factor, item_bytes), codegen


@code_for_constants
def add_numbers(_context, first, second, out, num_vectors, item_bytes):  # type: ignore[no-untyped-def]
    """Sums of the numbers at two addresses, rounded to the dtype."""
    (size,) = values_of(item_bytes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        *sources, target, num = arguments[:4]
        with each_vector(builder, num, size) as offset:
            a, b = (load(builder, builder.add(source, offset), 0, MAX_LANES, size) for source in sources)
            store_as(builder, builder.add(target, offset), 0, builder.fadd(a, b), size)
        return context.get_dummy_value()

    return types.void(first, second, out, num_vectors, item_bytes), codegen


@code_for_constants
def silu_times(_context, gates, values, out, num_vectors, item_bytes):  # type: ignore[no-untyped-def]
    """``silu(gates) * values`` with silu(x) = x / (1 + exp(-x)), rounded to the dtype after each step."""
    (size,) = values_of(item_bytes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        gate_address, value_address, out_address, num = arguments[:4]
        ones = ir.Constant(ir.VectorType(FLOAT, MAX_LANES), [1.0] * MAX_LANES)
        with each_vector(builder, num, size) as offset:
            gate = load(builder, builder.add(gate_address, offset), 0, MAX_LANES, size)
            value = load(builder, builder.add(value_address, offset), 0, MAX_LANES, size)
            decay = exponential(builder, builder.fneg(gate), MAX_LANES)
            silu = rounded(builder, builder.fdiv(gate, builder.fadd(ones, decay)), MAX_LANES, size)
            store_as(builder, builder.add(out_address, offset), 0, builder.fmul(silu, value), size)
        return context.get_dummy_value()

    return types.void(gates, values, out, num_vectors, item_bytes), codegen


@code_for_constants
def turn_halves(_context, head, cos, sin, half, item_bytes):  # type: ignore[no-untyped-def]
    """Rotate one head of ``2 * half`` numbers in place, by tables of as many: channel i pairs with i + half.

    The products are rounded to the dtype before they are added, as torch's are. ``half`` and ``item_bytes`` are
    constants.
    """
    count, size = values_of(half, item_bytes)
    lanes = lanes_for(count)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        head_address, cos_address, sin_address = arguments[:3]

        def product(a: Any, b: Any) -> Any:
            return rounded(builder, builder.fmul(a, b), lanes, size)

        for low in range(0, count, lanes):
            high = low + count
            x, y = (load(builder, head_address, at, lanes, size) for at in (low, high))
            (cos_x, cos_y), (sin_x, sin_y) = (
                [load(builder, table, at, lanes, size) for at in (low, high)] for table in (cos_address, sin_address)
            )
            turned_x = builder.fsub(product(x, cos_x), product(y, sin_x))
            turned_y = builder.fadd(product(y, cos_y), product(x, sin_y))
            store_as(builder, head_address, low, turned_x, size)
            store_as(builder, head_address, high, turned_y, size)
        return context.get_dummy_value()

    return types.void(head, cos, sin, half, item_bytes), codegen
