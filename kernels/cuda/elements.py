"""How kernels read and write numbers: float32 in registers, float32, float16 or bfloat16 in memory.

16-bit floats travel as bit patterns, which every architecture takes; bfloat16 is widened by a shift and rounded to
nearest even, as torch does, with NaN kept NaN. ``load_vector`` and ``store_vector`` move 16 bytes at once, which plain
Numba code never becomes; addresses must be multiples of 16 bytes. The simulator runs plain twins of the intrinsics.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import cuda, float32, types, uint16, uint32
from torch import Tensor

from tide_kernels.cuda.kernel import IS_SIMULATED

VECTOR_BYTES = 16


class Elements(NamedTuple):
    """Device functions for numbers of one dtype.

    load(p, i) -> float32; store(p, i, x); rounded(x): x as it comes back from memory; load_vector(p, i, out) and
    store_vector(p, i, x): ``lanes`` numbers from the i-th on, in a local float32 array.
    """

    lanes: int
    load: Any
    store: Any
    rounded: Any
    load_vector: Any
    store_vector: Any


@functools.cache
def elements(dtype: torch.dtype, *, is_vector: bool = True) -> Elements:
    """Device functions for float32, float16 or bfloat16; without ``is_vector`` a vector is a single number."""
    load, store, rounded, load_vector, store_vector = {
        torch.float32: (_load_float, _store_float, _as_it_is, _load_floats, _store_floats),
        torch.float16: (_load_half, _store_half, _round_half, _load_halves, _store_halves),
        torch.bfloat16: (_load_bfloat, _store_bfloat, _round_bfloat, _load_bfloats, _store_bfloats),
    }[dtype]
    if is_vector:
        return Elements(VECTOR_BYTES // dtype.itemsize, load, store, rounded, load_vector, store_vector)

    @cuda.jit(device=True)
    def load_one(cells, i, out):  # type: ignore[no-untyped-def]
        out[0] = load(cells, i)

    @cuda.jit(device=True)
    def store_one(cells, i, values):  # type: ignore[no-untyped-def]
        store(cells, i, values[0])

    return Elements(1, load, store, rounded, load_one, store_one)


def is_aligned(*tensors: Tensor) -> bool:
    """Whether all tensors begin where 16 bytes can be read at once."""
    return all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)


if IS_SIMULATED:

    def load_words(cells, i):  # type: ignore[no-untyped-def]
        """The 16 bytes from the ``i``-th cell on, as four uint32."""
        return tuple(cells[i : i + VECTOR_BYTES // cells.itemsize].view(np.uint32))

    def store_words(cells, i, a, b, c, d):  # type: ignore[no-untyped-def]
        """The inverse of ``load_words``."""
        words = np.array([a, b, c, d], dtype=np.uint32)
        cells[i : i + VECTOR_BYTES // cells.itemsize] = words.view(cells.dtype)

    def float_from_half(bits):  # type: ignore[no-untyped-def]
        return float32(np.uint16(bits).view(np.float16))

    def half_from_float(value):  # type: ignore[no-untyped-def]
        with np.errstate(over="ignore"):
            return np.float16(value).view(np.uint16)

else:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

    @intrinsic
    def load_words(_typing_context, cells, i):  # type: ignore[no-untyped-def]
        """The 16 bytes from the ``i``-th cell on, as four uint32."""

        def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
            words = builder.load(_vector_at(builder, *arguments), align=VECTOR_BYTES)
            return cgutils.pack_array(
                builder, [builder.extract_element(words, ir.IntType(32)(lane)) for lane in range(4)]
            )

        return types.UniTuple(types.uint32, 4)(cells, i), codegen

    @intrinsic
    def store_words(_typing_context, cells, i, a, b, c, d):  # type: ignore[no-untyped-def]
        """The inverse of ``load_words``."""

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            words = ir.Constant(ir.VectorType(ir.IntType(32), 4), ir.Undefined)
            for lane, (word, kind) in enumerate(zip(arguments[2:], signature.args[2:], strict=True)):
                word = context.cast(builder, word, kind, types.uint32)
                words = builder.insert_element(words, word, ir.IntType(32)(lane))
            builder.store(words, _vector_at(builder, *arguments[:2]), align=VECTOR_BYTES)
            return context.get_dummy_value()

        return types.void(cells, i, a, b, c, d), codegen

    def _vector_at(builder: ir.IRBuilder, cells: Any, index: Any) -> Any:
        return builder.bitcast(builder.gep(cells, [index]), ir.VectorType(ir.IntType(32), 4).as_pointer())

    @intrinsic
    def float_from_half(_typing_context, bits):  # type: ignore[no-untyped-def]
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            half = context.cast(builder, arguments[0], signature.args[0], types.uint16)
            return builder.fpext(builder.bitcast(half, ir.HalfType()), ir.FloatType())

        return types.float32(bits), codegen

    @intrinsic
    def half_from_float(_typing_context, value):  # type: ignore[no-untyped-def]
        """To the nearest, ties to even."""

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            number = context.cast(builder, arguments[0], signature.args[0], types.float32)
            return builder.bitcast(builder.fptrunc(number, ir.HalfType()), ir.IntType(16))

        return types.uint16(value), codegen


@cuda.jit(device=True)
def bits_of(value):  # type: ignore[no-untyped-def]
    """The bit pattern of a float32."""
    return float32(value).view(np.uint32)


@cuda.jit(device=True)
def float_from(bits):  # type: ignore[no-untyped-def]
    """The float32 of a bit pattern."""
    return uint32(bits).view(np.float32)


@cuda.jit(device=True)
def bfloat_from_float(value):  # type: ignore[no-untyped-def]
    """The upper half of a float32, rounded to nearest even; rounding a NaN's pattern could make it infinite or 0."""
    if value != value:
        return uint32(0x7FC0)
    bits = bits_of(value)
    odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
    return uint32(uint32(bits + uint32(uint32(0x7FFF) + odd)) >> uint32(16))


@cuda.jit(device=True)
def _as_it_is(value):  # type: ignore[no-untyped-def]
    return value


@cuda.jit(device=True)
def _load_float(cells, i):  # type: ignore[no-untyped-def]
    return cells[i]


@cuda.jit(device=True)
def _store_float(cells, i, value):  # type: ignore[no-untyped-def]
    cells[i] = value


@cuda.jit(device=True)
def _load_floats(cells, i, out):  # type: ignore[no-untyped-def]
    a, b, c, d = load_words(cells, i)
    out[0], out[1], out[2], out[3] = float_from(a), float_from(b), float_from(c), float_from(d)


@cuda.jit(device=True)
def _store_floats(cells, i, values):  # type: ignore[no-untyped-def]
    store_words(cells, i, bits_of(values[0]), bits_of(values[1]), bits_of(values[2]), bits_of(values[3]))


@cuda.jit(device=True)
def _round_half(value):  # type: ignore[no-untyped-def]
    return float_from_half(half_from_float(value))


@cuda.jit(device=True)
def _load_half(cells, i):  # type: ignore[no-untyped-def]
    return float_from_half(cells[i])


@cuda.jit(device=True)
def _store_half(cells, i, value):  # type: ignore[no-untyped-def]
    cells[i] = half_from_float(value)


@cuda.jit(device=True)
def _split_halves(word, k, out):  # type: ignore[no-untyped-def]
    out[k] = float_from_half(uint16(word & uint32(0xFFFF)))
    out[k + 1] = float_from_half(uint16(word >> uint32(16)))


@cuda.jit(device=True)
def _joined_halves(values, k):  # type: ignore[no-untyped-def]
    return uint32(half_from_float(values[k])) | uint32(uint32(half_from_float(values[k + 1])) << uint32(16))


@cuda.jit(device=True)
def _round_bfloat(value):  # type: ignore[no-untyped-def]
    return float_from(uint32(bfloat_from_float(value) << uint32(16)))


@cuda.jit(device=True)
def _load_bfloat(cells, i):  # type: ignore[no-untyped-def]
    return float_from(uint32(uint32(cells[i]) << uint32(16)))


@cuda.jit(device=True)
def _store_bfloat(cells, i, value):  # type: ignore[no-untyped-def]
    cells[i] = uint16(bfloat_from_float(value))


@cuda.jit(device=True)
def _split_bfloats(word, k, out):  # type: ignore[no-untyped-def]
    out[k], out[k + 1] = float_from(uint32(word << uint32(16))), float_from(uint32(word & uint32(0xFFFF0000)))


@cuda.jit(device=True)
def _joined_bfloats(values, k):  # type: ignore[no-untyped-def]
    return bfloat_from_float(values[k]) | uint32(bfloat_from_float(values[k + 1]) << uint32(16))


def _by_pairs(split: Any, joined: Any) -> tuple[Any, Any]:
    """``load_vector`` and ``store_vector`` of 16-bit numbers, of which a word holds two."""

    @cuda.jit(device=True)
    def load_eight(cells, i, out):  # type: ignore[no-untyped-def]
        a, b, c, d = load_words(cells, i)
        split(a, 0, out)
        split(b, 2, out)
        split(c, 4, out)
        split(d, 6, out)

    @cuda.jit(device=True)
    def store_eight(cells, i, values):  # type: ignore[no-untyped-def]
        store_words(cells, i, joined(values, 0), joined(values, 2), joined(values, 4), joined(values, 6))

    return load_eight, store_eight


_load_halves, _store_halves = _by_pairs(_split_halves, _joined_halves)
_load_bfloats, _store_bfloats = _by_pairs(_split_bfloats, _joined_bfloats)
