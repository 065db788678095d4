"""SIMD building blocks for Numba CPU kernels, as LLVM vector code that LLVM lowers for whatever CPU it runs on.

Numba leaves vectorising to LLVM, which does well with plain loops but sums the lanes of each dot product on their own,
and leaves maxima and exponentials scalar. Here sixteen dot products share one tree of sums, and what is loaded serves a
group of query rows. Each function becomes straight-line code for its constant arguments. Addresses are integers
(``array.ctypes.data``); bfloat16 is read as 16-bit patterns and widened.

Numba keeps compiled kernels on disk until their own file changes: after an edit here, touch the files that import it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

MAX_LANES = 16
MAX_TOKENS = 16
FLOAT = ir.FloatType()
FLOAT_BYTES = 4
LINE_BYTES = 64
TILE_OUTPUTS = 64
LOG2_E, LN2_PARTS = 1.44269504088896341, (0.693359375, -2.12194440e-4)
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
MAY_FUSE = ("contract", "reassoc", "nsz")

_code_for_constants: Any = intrinsic(prefer_literal=True)


def lanes_for(width: int) -> int:
    """Lanes of the vectors that rows of ``width`` numbers are cut into."""
    return math.gcd(width, MAX_LANES)


def tokens_for(page_size: int) -> int:
    """Tokens that are handled together: a power of two that divides the page."""
    return math.gcd(page_size, MAX_TOKENS)


def rows_for(group: int) -> int:
    """Query rows of a group that share what is loaded: its largest divisor up to 4, which still fits registers."""
    return max(rows for rows in range(1, 5) if group % rows == 0)


@_code_for_constants
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
    width, rows, tokens, size = _values(head_dim, num_rows, num_tokens, item_bytes)
    lanes = lanes_for(width)
    chunks = range(width // lanes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        query_address, key_address, ahead_address, score_address, step = arguments[:5]
        query = [[_load(builder, query_address, r * width + c * lanes, lanes) for c in chunks] for r in range(rows)]
        sums: list[list[Any]] = [[] for _ in range(rows)]
        for token in range(tokens):
            _prefetch(builder, ahead_address, token * width * size, width * size)
            key = [_load(builder, key_address, token * width + c * lanes, lanes, size) for c in chunks]
            for row in range(rows):
                total = builder.fmul(query[row][0], key[0], flags=MAY_FUSE)
                for c in chunks[1:]:
                    total = _multiply_add(builder, query[row][c], key[c], total)
                sums[row].append(total)
        for row in range(rows):
            address = builder.add(score_address, builder.mul(step, step.type(row)))
            _store(builder, address, 0, _sum_lanes(builder, sums[row], lanes))
        return context.get_dummy_value()

    arguments = (queries, keys, ahead, scores, stride, head_dim, num_rows, num_tokens, item_bytes)
    return types.void(*arguments), codegen


@_code_for_constants
def add_weighted_tokens(_context, sums, values, ahead, weights, stride, head_dim, num_rows, num_tokens, item_bytes):  # type: ignore[no-untyped-def]
    """Add ``num_tokens`` values to ``num_rows`` sums, each times the row's weight for that token.

    Args:
        sums, values, weights: addresses of float32 ``[num_rows, head_dim]``, of ``[num_tokens, head_dim]`` and of the
            first weight.
        ahead: as in ``score_tokens``, by the values' bytes.
        stride: bytes from one row's weights to the next row's.
        head_dim, num_rows, num_tokens, item_bytes: constants, as in ``score_tokens``.
    """
    width, rows, tokens, size = _values(head_dim, num_rows, num_tokens, item_bytes)
    lanes = lanes_for(width)
    chunks = range(width // lanes)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        sum_address, value_address, ahead_address, weight_address, step = arguments[:5]
        totals = [[_load(builder, sum_address, r * width + c * lanes, lanes) for c in chunks] for r in range(rows)]
        starts = [builder.add(weight_address, builder.mul(step, step.type(row))) for row in range(rows)]
        for token in range(tokens):
            _prefetch(builder, ahead_address, token * width * size, width * size)
            weight = [_load_everywhere(builder, start, token, lanes) for start in starts]
            for c in chunks:
                value = _load(builder, value_address, token * width + c * lanes, lanes, size)
                for row in range(rows):
                    totals[row][c] = _multiply_add(builder, weight[row], value, totals[row][c])
        for row in range(rows):
            for c in chunks:
                _store(builder, sum_address, row * width + c * lanes, totals[row][c])
        return context.get_dummy_value()

    arguments = (sums, values, ahead, weights, stride, head_dim, num_rows, num_tokens, item_bytes)
    return types.void(*arguments), codegen


@_code_for_constants
def raise_to(_context, maxima, numbers, num):  # type: ignore[no-untyped-def]
    """Raise ``num`` (a constant) maxima to as many numbers where those are larger. Addresses of float32."""
    lanes = num.literal_value

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        old, new = (_load(builder, address, 0, lanes) for address in arguments[:2])
        _store(builder, arguments[0], 0, builder.select(builder.fcmp_ordered(">", new, old), new, old))
        return context.get_dummy_value()

    return types.void(maxima, numbers, num), codegen


@_code_for_constants
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
        x = builder.fsub(_load(builder, number_address, 0, lanes), _load_everywhere(builder, top_address, 0, lanes))
        x = builder.select(builder.fcmp_ordered("<", x, constant(-87.0)), constant(-87.0), x)
        n = builder.fptosi(builder.fadd(builder.fmul(x, constant(LOG2_E)), constant(-0.5)), ints)
        z = builder.sitofp(n, floats)
        for part in LN2_PARTS:
            x = _multiply_add(builder, z, constant(-part), x)
        y = constant(EXP_POLYNOMIAL[0])
        for coefficient in EXP_POLYNOMIAL[1:]:
            y = _multiply_add(builder, y, x, constant(coefficient))
        y = builder.fadd(_multiply_add(builder, builder.fmul(y, x), x, x), constant(1.0))
        power = builder.shl(builder.add(n, ir.Constant(ints, [127] * lanes)), ir.Constant(ints, [23] * lanes))
        result = builder.fmul(y, builder.bitcast(power, floats))
        _store(builder, number_address, 0, result)
        _store(builder, sum_address, 0, builder.fadd(_load(builder, sum_address, 0, lanes), result))
        return context.get_dummy_value()

    return types.void(numbers, sums, top, num), codegen


@_code_for_constants
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
    (count,) = _values(num_rows)
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
                pair = builder.load(_pointer(builder, place, 0, ir.IntType(32)), align=4)
                one = builder.insert_element(ir.Constant(ints, ir.Undefined), pair, ir.IntType(32)(0))
                inputs.append(both(builder, _shuffle(builder, one, one, [0] * lanes)))
            for vector in vectors:
                weight = builder.load(_pointer(builder, at, vector * lanes * 4, ints), align=4)
                for half, part in enumerate(both(builder, weight)):
                    for row in range(count):
                        total = builder.load(sums[row][vector])
                        builder.store(_multiply_add(builder, inputs[row][half], part, total), sums[row][vector])
        has_bias = builder.icmp_unsigned("!=", bias_address, bias_address.type(0))
        with builder.if_then(has_bias):
            for vector in vectors:
                shift = _load(builder, bias_address, vector * lanes, lanes, 2)
                for row in range(count):
                    builder.store(builder.fadd(builder.load(sums[row][vector]), shift), sums[row][vector])
        for row in range(count):
            target = builder.add(out_address, builder.mul(out_step, out_step.type(row)))
            for vector in vectors:
                _store_rounded(builder, target, vector * lanes, _round(builder, builder.load(sums[row][vector]), lanes))
        return context.get_dummy_value()

    arguments = (rows, weights, bias, out, row_bytes, out_bytes, num_pairs, num_rows)
    return types.void(*arguments), codegen


@_code_for_constants
def sum_of_squares(_context, numbers, num_vectors):  # type: ignore[no-untyped-def]
    """The sum of the squares of ``MAX_LANES * num_vectors`` bfloat16 numbers at an address, as float32."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        address, num = arguments
        total = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(FLOAT, MAX_LANES), None))
        with cgutils.for_range(builder, num) as loop:
            at = builder.add(address, builder.mul(loop.index, loop.index.type(MAX_LANES * 2)))
            x = _load(builder, at, 0, MAX_LANES, 2)
            builder.store(_multiply_add(builder, x, x, builder.load(total)), total)
        lanes = _sum_lanes(builder, [builder.load(total)], MAX_LANES)
        return builder.extract_element(lanes, ir.IntType(32)(0))

    return types.float32(numbers, num_vectors), codegen


@_code_for_constants
def scale_twice(_context, numbers, weights, out, num_vectors, factor):  # type: ignore[no-untyped-def]
    """``weights * (numbers * factor)``, rounded to bfloat16 after each product; addresses of bfloat16, a float32."""

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        number_address, weight_address, out_address, num, value = arguments
        kind = ir.VectorType(FLOAT, MAX_LANES)
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
        everywhere = _shuffle(builder, first, first, [0] * MAX_LANES)
        with cgutils.for_range(builder, num) as loop:
            step = builder.mul(loop.index, loop.index.type(MAX_LANES * 2))
            x, weight = (
                _load(builder, builder.add(start, step), 0, MAX_LANES, 2) for start in (number_address, weight_address)
            )
            bits = _round(builder, builder.fmul(x, everywhere), MAX_LANES)
            scaled = builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * MAX_LANES)), kind)
            place = builder.add(out_address, step)
            _store_rounded(builder, place, 0, _round(builder, builder.fmul(scaled, weight), MAX_LANES))
        return context.get_dummy_value()

    return types.void(numbers, weights, out, num_vectors, factor), codegen


def _values(*constants: Any) -> tuple[int, ...]:
    """The values of arguments that are constants, from their types."""
    return tuple(kind.literal_value for kind in constants)


def _prefetch(builder: ir.IRBuilder, address: Any, offset: int, num_bytes: int) -> None:
    """Ask for the cache lines of ``num_bytes`` bytes; nothing is read, so they may lie anywhere."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    request = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(offset, offset + num_bytes, LINE_BYTES):
        arguments = [_pointer(builder, address, line, ir.IntType(8)), number(0), number(3), number(1)]
        builder.call(request, arguments)  # for reading, to keep, data


def _pointer(builder: ir.IRBuilder, address: Any, offset: int, kind: ir.Type) -> Any:
    return builder.inttoptr(builder.add(address, address.type(offset)), kind.as_pointer())


def _load(builder: ir.IRBuilder, address: Any, number: int, lanes: int, item_bytes: int = FLOAT_BYTES) -> Any:
    """``lanes`` numbers from the ``number``-th on, as float32."""
    if item_bytes == FLOAT_BYTES:
        return builder.load(_pointer(builder, address, number * 4, ir.VectorType(FLOAT, lanes)), align=4)
    bits = builder.load(_pointer(builder, address, number * 2, ir.VectorType(ir.IntType(16), lanes)), align=2)
    wide = ir.VectorType(ir.IntType(32), lanes)
    shifted = builder.shl(builder.zext(bits, wide), ir.Constant(wide, [16] * lanes))
    return builder.bitcast(shifted, ir.VectorType(FLOAT, lanes))


def _load_everywhere(builder: ir.IRBuilder, address: Any, number: int, lanes: int) -> Any:
    """One float32 in every lane."""
    kind = ir.VectorType(FLOAT, lanes)
    value = builder.load(_pointer(builder, address, number * FLOAT_BYTES, FLOAT), align=4)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
    return _shuffle(builder, first, first, [0] * lanes)


def _store(builder: ir.IRBuilder, address: Any, number: int, value: Any) -> None:
    builder.store(value, _pointer(builder, address, number * FLOAT_BYTES, value.type), align=4)


def _round(builder: ir.IRBuilder, values: Any, lanes: int) -> Any:
    """float32 to bfloat16 patterns, in 32 bits: to the nearest, ties to even."""
    ints = ir.VectorType(ir.IntType(32), lanes)

    def everywhere(value: int) -> Any:
        return ir.Constant(ints, [value] * lanes)

    bits = builder.bitcast(values, ints)
    odd = builder.and_(builder.lshr(bits, everywhere(16)), everywhere(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, everywhere(0x7FFF))), everywhere(16))
    is_nan = builder.fcmp_unordered("uno", values, values)
    return builder.select(is_nan, everywhere(0x7FC0), rounded)


def _store_rounded(builder: ir.IRBuilder, address: Any, number: int, bits: Any) -> None:
    halves = ir.VectorType(ir.IntType(16), bits.type.count)
    builder.store(builder.trunc(bits, halves), _pointer(builder, address, number * 2, halves), align=2)


def _multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(c, builder.fmul(a, b, flags=MAY_FUSE), flags=MAY_FUSE)


def _sum_lanes(builder: ir.IRBuilder, vectors: list[Any], lanes: int) -> Any:
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
            builder.fadd(_shuffle(builder, a, b, even), _shuffle(builder, a, b, odd), flags=MAY_FUSE)
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        left //= 2
    if len(vectors) > 1:  # more results than lanes
        return _joined(builder, vectors, lanes)
    return vectors[0] if count == lanes else _shuffle(builder, vectors[0], vectors[0], list(range(count)))


def _joined(builder: ir.IRBuilder, vectors: list[Any], lanes: int) -> Any:
    """One vector of all ``vectors``, in order; their number is a power of two."""
    while len(vectors) > 1:
        vectors = [
            _shuffle(builder, a, b, list(range(2 * lanes))) for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        lanes *= 2
    return vectors[0]


def _shuffle(builder: ir.IRBuilder, a: Any, b: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes)))
