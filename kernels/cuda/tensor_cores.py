"""Products on tensor cores, for one warp: ``mma.sync`` on tiles of 16 x 8 with 16 in between, of 16-bit floats with
float32 sums (PTX ISA, "Warp-level matrix instructions"). From compute capability 8.0 on.

Lane ``4 g + t`` holds, as words of two numbers each: of A ``[16, 16]`` row g (words a0, a2) and row g + 8 (a1, a3), and
of B ``[16, 8]`` column g (b0, b1), each time numbers 2 t and 2 t + 1, then 2 t + 8 and 2 t + 9; and of C ``[16, 8]`` as
float32 columns 2 t and 2 t + 1 of row g (c0, c1) and of row g + 8 (c2, c3). The simulator runs plain twins.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import cuda, float32, types, uint32

from tide_kernels.cuda.elements import (
    bfloat_from_float,
    half_from_float,
)
from tide_kernels.cuda.kernel import IS_SIMULATED
from tide_kernels.cuda.reductions import ALL_LANES

OLDEST = 8, 0
"""Compute capability that has bfloat16 products."""


class TensorCores(NamedTuple):
    """Device functions for one 16-bit dtype.

    product(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3) -> the four numbers of A B + C; pair(low, high): two float32 rounded
    into a word.
    """

    product: Any
    pair: Any


@functools.cache
def tensor_cores(dtype: torch.dtype) -> TensorCores:
    """For float16 or bfloat16."""
    return _made(dtype)


if IS_SIMULATED:

    def low_halves(a, b):  # type: ignore[no-untyped-def]
        """The lower halves of two words, in one."""
        return uint32((int(a) & 0xFFFF) | (int(b) & 0xFFFF) << 16)

    def high_halves(a, b):  # type: ignore[no-untyped-def]
        """The upper halves of two words, in one."""
        return uint32(int(a) >> 16 | (int(b) >> 16) << 16)

    def _made(dtype: torch.dtype) -> TensorCores:
        is_half = dtype == torch.float16

        def numbers(words):  # type: ignore[no-untyped-def]
            """Float32 numbers of words, two of each."""
            bits = np.array(words, dtype=np.uint32).view(np.uint16)
            wide = bits.view(np.float16) if is_half else (bits.astype(np.uint32) << 16).view(np.float32)
            return wide.astype(np.float32)

        @cuda.jit(device=True)
        def product(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
            row, column = cuda.laneid // 4, cuda.laneid % 4 * 2
            first_lanes = (4 * row, 4 * column, 4 * column + 4)
            lanes = tuple(first + t for first in first_lanes for t in range(4))
            held = cuda.shfl_sync(ALL_LANES, (a0, a1, a2, a3, b0, b1), lanes)
            rows = [numbers([word for of in held[:4] for word in (of[k], of[2 + k])]) for k in range(2)]
            columns = [numbers([word for of in held[4 * k : 4 * k + 4] for word in of[4:]]) for k in (1, 2)]
            found = (float32(np.dot(a, b)) for a in rows for b in columns)
            return tuple(c + x for c, x in zip((c0, c1, c2, c3), found, strict=True))

        def pair(low, high):  # type: ignore[no-untyped-def]
            narrow = half_from_float if is_half else bfloat_from_float
            return uint32(int(narrow(low)) | int(narrow(high)) << 16)

        return TensorCores(product, pair)

else:
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

    WORD, NUMBER = ir.IntType(32), ir.FloatType()

    def _word_by(instruction: str, operands: tuple[Any, Any]) -> Any:
        """A device function of two operands that gives a word."""
        is_float = operands[0] is types.float32
        kind, constraint = (NUMBER, "f") if is_float else (WORD, "r")

        @intrinsic
        def call(_typing_context, a, b):  # type: ignore[no-untyped-def]
            def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
                given = [
                    context.cast(builder, value, has, wants)
                    for value, has, wants in zip(arguments, signature.args, operands, strict=True)
                ]
                function = ir.FunctionType(WORD, [kind, kind])
                return builder.call(ir.InlineAsm(function, instruction, f"=r,{constraint},{constraint}"), given)

            return types.uint32(a, b), codegen

        return call

    _WORDS, _NUMBERS = (types.uint32, types.uint32), (types.float32, types.float32)
    low_halves = _word_by("prmt.b32 $0, $1, $2, 0x5410;", _WORDS)
    high_halves = _word_by("prmt.b32 $0, $1, $2, 0x7632;", _WORDS)

    def _made(dtype: torch.dtype) -> TensorCores:
        kind = "f16" if dtype == torch.float16 else "bf16"
        instruction = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )

        @intrinsic
        def product(_typing_context, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
            def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
                wanted = [types.uint32] * 6 + [types.float32] * 4
                given = [
                    context.cast(builder, value, has, wants)
                    for value, has, wants in zip(arguments, signature.args, wanted, strict=True)
                ]
                function = ir.FunctionType(ir.LiteralStructType([NUMBER] * 4), [WORD] * 6 + [NUMBER] * 4)
                constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
                # All lanes take part, so it must stay where it is.
                made = builder.call(ir.InlineAsm(function, instruction, constraints, side_effect=True), given)
                return cgutils.pack_array(builder, [builder.extract_value(made, i) for i in range(4)])

            return types.UniTuple(types.float32, 4)(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3), codegen

        high_first = _word_by(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", _NUMBERS)

        @cuda.jit(device=True)
        def pair(low, high):  # type: ignore[no-untyped-def]
            return high_first(high, low)

        return TensorCores(product, pair)
