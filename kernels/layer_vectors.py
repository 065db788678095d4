"""Vector code of layers around attention and products: norms, rotary, SiLU, sums."""

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
    each_vector,
    exponential,
    in_every_lane,
    lanes_for,
    load,
    multiply_add,
    rounded,
    store_as,
    sum_lanes,
    values_of,
)


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


def silu(builder: ir.IRBuilder, x: Any, item_bytes: int) -> Any:
    """x / (1 + exp(-x)), rounded to the dtype of ``item_bytes``."""
    ones = ir.Constant(x.type, [1.0] * MAX_LANES)
    decay = exponential(builder, builder.fneg(x), MAX_LANES)
    return rounded(builder, builder.fdiv(x, builder.fadd(ones, decay)), MAX_LANES, item_bytes)


@code_for_constants
def silu_times(_context, gates, values, out, num_vectors, item_bytes):  # type: ignore[no-untyped-def]
    """``silu(gates) * values`` with silu(x) = x / (1 + exp(-x)), rounded to the dtype after each step."""
    (size,) = values_of(item_bytes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        gate_address, value_address, out_address, num = arguments[:4]
        with each_vector(builder, num, size) as offset:
            gate = load(builder, builder.add(gate_address, offset), 0, MAX_LANES, size)
            value = load(builder, builder.add(value_address, offset), 0, MAX_LANES, size)
            product = builder.fmul(silu(builder, gate, size), value)
            store_as(builder, builder.add(out_address, offset), 0, product, size)
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
