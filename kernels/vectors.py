"""Pieces of LLVM vector code that Numba CPU kernels are built of; LLVM lowers them for whatever CPU it runs on.

Numba leaves vectorising to LLVM, which does well with plain loops but sums the lanes of each dot product on their own,
and leaves maxima and exponentials scalar. What is built here becomes straight-line code for its constant arguments, see
``attention_vectors`` and ``layer_vectors``. Addresses are integers (``array.ctypes.data``); bfloat16 is read as 16-bit
patterns and widened.

Numba keeps compiled kernels on disk until their own file changes: after an edit here, touch the files that import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

MAX_LANES = 16
FLOAT = ir.FloatType()
FLOAT_BYTES = 4
LINE_BYTES = 64
MAY_FUSE = ("contract", "reassoc", "nsz")

code_for_constants: Any = intrinsic(prefer_literal=True)
"""A function of an ``intrinsic`` that sees the values of arguments that are constants, see ``values_of``."""


def values_of(*constants: Any) -> tuple[int, ...]:
    """The values of arguments that are constants, from their types."""
    return tuple(kind.literal_value for kind in constants)


def prefetch(builder: ir.IRBuilder, address: Any, offset: int, num_bytes: int) -> None:
    """Ask for the cache lines of ``num_bytes`` bytes; nothing is read, so they may lie anywhere."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    request = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(offset, offset + num_bytes, LINE_BYTES):
        arguments = [pointer(builder, address, line, ir.IntType(8)), number(0), number(3), number(1)]
        builder.call(request, arguments)  # for reading, to keep, data


def pointer(builder: ir.IRBuilder, address: Any, offset: int, kind: ir.Type) -> Any:
    return builder.inttoptr(builder.add(address, address.type(offset)), kind.as_pointer())


def load(builder: ir.IRBuilder, address: Any, number: int, lanes: int, item_bytes: int = FLOAT_BYTES) -> Any:
    """``lanes`` numbers from the ``number``-th on, as float32."""
    if item_bytes == FLOAT_BYTES:
        return builder.load(pointer(builder, address, number * 4, ir.VectorType(FLOAT, lanes)), align=4)
    bits = builder.load(pointer(builder, address, number * 2, ir.VectorType(ir.IntType(16), lanes)), align=2)
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
    """float32 to bfloat16 patterns, in 32 bits: to the nearest, ties to even."""
    ints = ir.VectorType(ir.IntType(32), lanes)

    def everywhere(value: int) -> Any:
        return ir.Constant(ints, [value] * lanes)

    bits = builder.bitcast(values, ints)
    odd = builder.and_(builder.lshr(bits, everywhere(16)), everywhere(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, everywhere(0x7FFF))), everywhere(16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    return builder.select(is_nan, everywhere(0x7FC0), rounded)


def store_rounded(builder: ir.IRBuilder, address: Any, number: int, bits: Any) -> None:
    halves = ir.VectorType(ir.IntType(16), bits.type.count)
    builder.store(builder.trunc(bits, halves), pointer(builder, address, number * 2, halves), align=2)


def multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(c, builder.fmul(a, b, flags=MAY_FUSE), flags=MAY_FUSE)


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
