"""Pieces of LLVM vector code that Numba CPU kernels are built of; LLVM lowers them for whatever CPU it runs on.

Numba leaves vectorising to LLVM, which does well with plain loops but sums the lanes of each dot product on their own,
and leaves maxima and exponentials scalar. What is built here becomes straight-line code for its constant arguments, see
``attention_vectors`` and ``layer_vectors``. Addresses are integers (``array.ctypes.data``); bfloat16 is read as 16-bit
patterns and widened.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

MAX_LANES = 16
FLOAT = ir.FloatType()
FLOAT_BYTES = 4
LINE_BYTES = 64
MAY_FUSE = ("contract", "reassoc", "nsz")
LOG2_E, LN2_PARTS = 1.44269504088896341, (0.693359375, -2.12194440e-4)
EXP_RANGE = -87.0, 88.0
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)

code_for_constants: Any = intrinsic(prefer_literal=True)
"""A function of an ``intrinsic`` that sees the values of arguments that are constants, see ``values_of``."""


def lanes_for(width: int) -> int:
    """Lanes of the vectors that rows of ``width`` numbers are cut into."""
    return math.gcd(width, MAX_LANES)


@code_for_constants
def int32_at(_context, address, index):  # type: ignore[no-untyped-def]
    """The ``index``-th int32 from an address on."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        start, number = arguments
        place = builder.add(start, builder.mul(number, number.type(4)))
        value = builder.load(pointer(builder, place, 0, ir.IntType(32)), align=4)
        return builder.sext(value, ir.IntType(64))

    return types.int64(types.int64, types.int64), codegen


@code_for_constants
def int64_at(_context, address, index):  # type: ignore[no-untyped-def]
    """The ``index``-th int64 from an address on."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        start, number = arguments
        place = builder.add(start, builder.mul(number, number.type(8)))
        return builder.load(pointer(builder, place, 0, ir.IntType(64)), align=8)

    return types.int64(types.int64, types.int64), codegen


@code_for_constants
def copy_bytes(_context, source, target, num_bytes):  # type: ignore[no-untyped-def]
    """Copy between addresses that do not overlap."""

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        from_, to = (pointer(builder, address, 0, ir.IntType(8)) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, from_, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def values_of(*constants: Any) -> tuple[int, ...]:
    """The values of arguments that are constants, from their types."""
    return tuple(kind.literal_value for kind in constants)


def prefetch(builder: ir.IRBuilder, address: Any, offset: int, num_bytes: int, *, into_level: int = 1) -> None:
    """Ask for the cache lines of ``num_bytes`` bytes; nothing is read, so they may lie anywhere."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    request = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(offset, offset + num_bytes, LINE_BYTES):
        arguments = [pointer(builder, address, line, ir.IntType(8)), number(0), number(4 - into_level), number(1)]
        builder.call(request, arguments)  # for reading, to keep in caches from this level on, data


def pointer(builder: ir.IRBuilder, address: Any, offset: int, kind: ir.Type) -> Any:
    return builder.inttoptr(builder.add(address, address.type(offset)), kind.as_pointer())


def load(builder: ir.IRBuilder, address: Any, number: int, lanes: int, item_bytes: int = FLOAT_BYTES) -> Any:
    """``lanes`` numbers from the ``number``-th on, as float32."""
    if item_bytes == FLOAT_BYTES:
        return builder.load(pointer(builder, address, number * 4, ir.VectorType(FLOAT, lanes)), align=4)
    bits = builder.load(pointer(builder, address, number * 2, ir.VectorType(ir.IntType(16), lanes)), align=2)
    return widened(builder, bits)


def widened(builder: ir.IRBuilder, bits: Any) -> Any:
    """bfloat16 patterns of 16 bits as float32."""
    lanes = bits.type.count
    wide = ir.VectorType(ir.IntType(32), lanes)
    shifted = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(shifted, ir.VectorType(FLOAT, lanes))


def load_everywhere(builder: ir.IRBuilder, address: Any, number: int, lanes: int) -> Any:
    """One float32 in every lane."""
    return in_every_lane(builder, builder.load(pointer(builder, address, number * FLOAT_BYTES, FLOAT), align=4), lanes)


def in_every_lane(builder: ir.IRBuilder, value: Any, lanes: int) -> Any:
    """A vector of one value."""
    first = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.IntType(32)(0)
    )
    return shuffle(builder, first, first, [0] * lanes)


def store(builder: ir.IRBuilder, address: Any, number: int, value: Any) -> None:
    builder.store(value, pointer(builder, address, number * FLOAT_BYTES, value.type), align=4)


def round_to_bfloat16(builder: ir.IRBuilder, values: Any, lanes: int) -> Any:
    """float32 to bfloat16 patterns of 16 bits: to the nearest, ties to even. Denormal numbers may become zero."""
    halves = ir.VectorType(ir.IntType(16), lanes)
    if lanes == MAX_LANES and has_pair_products():
        kind = ir.FunctionType(ir.VectorType(_BFloat16(), lanes), [values.type])
        convert = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
        return builder.bitcast(builder.call(convert, [values]), halves)
    ints = ir.VectorType(ir.IntType(32), lanes)

    def everywhere(value: int) -> Any:
        return ir.Constant(ints, [value] * lanes)

    bits = builder.bitcast(values, ints)
    odd = builder.and_(builder.lshr(bits, everywhere(16)), everywhere(1))
    nearest = builder.lshr(builder.add(bits, builder.add(odd, everywhere(0x7FFF))), everywhere(16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    return builder.trunc(builder.select(is_nan, everywhere(0x7FC0), nearest), halves)


def rounded(builder: ir.IRBuilder, values: Any, lanes: int, item_bytes: int) -> Any:
    """float32 as they come back from memory that holds ``item_bytes`` for each: rounded to bfloat16, or as they are."""
    if item_bytes == FLOAT_BYTES:
        return values
    return widened(builder, round_to_bfloat16(builder, values, lanes))


def store_as(builder: ir.IRBuilder, address: Any, number: int, values: Any, item_bytes: int) -> None:
    """Store float32 as they are, or rounded to bfloat16 where ``item_bytes`` is 2."""
    if item_bytes == FLOAT_BYTES:
        store(builder, address, number, values)
        return
    bits = round_to_bfloat16(builder, values, values.type.count)
    builder.store(bits, pointer(builder, address, number * 2, bits.type), align=2)


@contextmanager
def each_vector(builder: ir.IRBuilder, num_vectors: Any, item_bytes: int) -> Iterator[Any]:
    """A loop over vectors of MAX_LANES numbers that lie one after another; yields the byte offset of each."""
    with cgutils.for_range(builder, num_vectors) as loop:
        yield builder.mul(loop.index, loop.index.type(MAX_LANES * item_bytes))


def exponential(builder: ir.IRBuilder, x: Any, lanes: int) -> Any:
    """exp(x) = 2^n exp(r) with Cephes' single-precision polynomial (expf.c), good to 2 ulp; x is cut to EXP_RANGE."""
    floats, ints = x.type, ir.VectorType(ir.IntType(32), lanes)

    def constant(value: float) -> Any:
        return ir.Constant(floats, [float(np.float32(value))] * lanes)

    low, high = map(constant, EXP_RANGE)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    half = builder.select(builder.fcmp_ordered("<", x, constant(0.0)), constant(-0.5), constant(0.5))
    n = builder.fptosi(builder.fadd(builder.fmul(x, constant(LOG2_E)), half), ints)  # which cuts towards zero
    z = builder.sitofp(n, floats)
    for part in LN2_PARTS:
        x = multiply_add(builder, z, constant(-part), x)
    y = constant(EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        y = multiply_add(builder, y, x, constant(coefficient))
    y = builder.fadd(multiply_add(builder, builder.fmul(y, x), x, x), constant(1.0))
    power = builder.shl(builder.add(n, ir.Constant(ints, [127] * lanes)), ir.Constant(ints, [23] * lanes))
    return builder.fmul(y, builder.bitcast(power, floats))


def multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(c, builder.fmul(a, b, flags=MAY_FUSE), flags=MAY_FUSE)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


@functools.cache
def compiles_for(feature: str) -> bool:
    """Whether the CPU that kernels are compiled for has a feature, in LLVM's names."""
    is_host = config.CPU_NAME is None and config.CPU_FEATURES is None  # type: ignore[attr-defined]
    return is_host and bool(get_host_cpu_features().get(feature))


def has_pair_products() -> bool:
    """Whether pairs of bfloat16 are multiplied and added in one instruction."""
    return compiles_for("avx512bf16")


def add_pair_products(builder: ir.IRBuilder, total: Any, a: Any, b: Any) -> Any:
    """``total + a_low * b_low + a_high * b_high`` for MAX_LANES pairs of bfloat16, each pair a 32-bit pattern."""
    if has_pair_products():
        pairs = ir.VectorType(_BFloat16(), 2 * MAX_LANES)
        kind = ir.FunctionType(total.type, [total.type, pairs, pairs])
        product = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(product, [total, builder.bitcast(a, pairs), builder.bitcast(b, pairs)])
    sixteen, high = (ir.Constant(a.type, [value] * MAX_LANES) for value in (16, 0xFFFF0000))
    for cut in (lambda pairs: builder.shl(pairs, sixteen), lambda pairs: builder.and_(pairs, high)):
        total = multiply_add(builder, builder.bitcast(cut(a), total.type), builder.bitcast(cut(b), total.type), total)
    return total


def sum_lanes(builder: ir.IRBuilder, vectors: list[Any], lanes: int) -> Any:
    """The sum of each vector's lanes, in one vector; their number is a power of two.

    Two vectors become one of sums of neighbours, the first's in its lower half. Once a single vector is left, its
    blocks of lanes shrink the same way.
    """
    even, odd = list(range(0, 2 * lanes, 2)), list(range(1, 2 * lanes, 2))
    count = len(vectors)
    left = lanes
    while left > 1:
        if len(vectors) == 1:
            vectors = [vectors[0], vectors[0]]
        vectors = [
            builder.fadd(shuffle(builder, a, b, even), shuffle(builder, a, b, odd), flags=MAY_FUSE)
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        left //= 2
    if len(vectors) > 1:  # more results than lanes
        return _joined(builder, vectors, lanes)
    return vectors[0] if count == lanes else shuffle(builder, vectors[0], vectors[0], list(range(count)))


def _joined(builder: ir.IRBuilder, vectors: list[Any], lanes: int) -> Any:
    """One vector of all ``vectors``, in order; their number is a power of two."""
    while len(vectors) > 1:
        vectors = [
            shuffle(builder, a, b, list(range(2 * lanes))) for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        lanes *= 2
    return vectors[0]


def shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))
