"""Vector code of products with packed bfloat16 weights: by pairs of numbers, or by tiles where a CPU has them.

A strip is STRIP_OUTPUTS outputs, two vectors of them. Of a weight matrix it reads, for every pair of inputs, the same
number of pairs of weights, which lie side by side.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import platform
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tide_kernels.layer_vectors import silu
from tide_kernels.vectors import (
    FLOAT,
    MAX_LANES,
    add_pair_products,
    code_for_constants,
    compiles_for,
    has_pair_products,
    in_every_lane,
    load,
    pointer,
    prefetch,
    rounded,
    store_as,
    values_of,
)

VECTORS = 2
STRIP_OUTPUTS = VECTORS * MAX_LANES
PAIRS_AHEAD = 32
ROWS_AT_ONCE = 12 if has_pair_products() else 4
"""Rows that share what is read of the weights, by pairs: their sums, and what is multiplied, fit vector registers."""
TILE_ROWS, TILE_PAIRS = 16, 16
"""A tile register holds 16 rows of 64 bytes: 16 pairs of bfloat16, or 16 float32."""
TILE_BYTES = 64
BLOCK_ROWS = 2 * TILE_ROWS
SUM_BYTES = VECTORS * TILE_BYTES
STRIP_BYTES = VECTORS * TILE_BYTES
LINES_ASKED = 4
"""Pairs of inputs of TILE_PAIRS whose weights of the next strip one block of rows asks for: a quarter, as decode steps
often have four blocks, and with fewer, memory is busy already."""
PLAIN, GATED, ADDED = range(3)
"""How products end, see ``multiply_pairs``."""
BYTE, WORD, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
SUMS, ROWS, WEIGHTS = ((0, 1), (2, 3)), (4, 5), (6, 7)
"""Tile registers: sums by rows and outputs, both blocks of rows, both blocks of weights."""


@functools.cache
def has_tile_products() -> bool:
    """Whether tiles of bfloat16 are multiplied in one instruction (AMX), and Linux lets this process do it."""
    if not compiles_for("amx-bf16") or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # see Documentation/arch/x86/xstate.rst of Linux
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@code_for_constants
def multiply_pairs(_context, rows, weights, bias, out, other, steps, num_pairs, num_rows, most, ending):  # type: ignore[no-untyped-def]
    """Products of ``num_rows`` rows with a strip of outputs, rounded to bfloat16 once.

    Args:
        rows, out: addresses of bfloat16 ``[num_rows, 2 num_pairs]`` and of the strip's outputs for the first row.
        weights: address of the pairs of weights for the first pair of inputs.
        bias: address of bfloat16 ``[STRIP_OUTPUTS]``; 0 for none.
        other: address of bfloat16 that the outputs are put together with, row by row as ``out``, which it may be.
        steps: bytes from one row to the next of ``rows`` and of ``out``, and from one pair of inputs to the next of the
            weights.
        num_pairs: pairs of inputs.
        num_rows: from 1 to ``most``, a constant; there is straight-line code for each number.
        ending: constant; PLAIN, or GATED for ``silu(other) * products``, or ADDED for ``other + products``.
    """
    limit, kind = values_of(most, ending)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        done = builder.append_basic_block("multiplied")
        choice = builder.switch(arguments[7], done)
        for count in range(1, limit + 1):
            block = builder.append_basic_block(f"rows_{count}")
            choice.add_case(arguments[7].type(count), block)
            builder.position_at_end(block)
            _multiply_rows(builder, count, arguments[:7], kind)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    arguments = (rows, weights, bias, out, other, steps, num_pairs, types.int64, most, ending)
    return types.void(*arguments), codegen


def _multiply_rows(builder: ir.IRBuilder, count: int, arguments: Sequence[Any], kind: int) -> None:
    row_address, weights, bias, out_address, other_address, steps, pairs = arguments
    row_step, out_step, weight_step = _all(builder, steps, 3)
    floats, ints = ir.VectorType(FLOAT, MAX_LANES), ir.VectorType(WORD, MAX_LANES)
    sums = [[cgutils.alloca_once(builder, floats) for _ in range(VECTORS)] for _ in range(count)]
    for total in itertools.chain(*sums):
        builder.store(ir.Constant(floats, None), total)
    with cgutils.for_range(builder, pairs) as loop:
        at = builder.add(weights, builder.mul(loop.index, weight_step))
        # The hardware foresees little of a strip that is a part of wider blocks.
        prefetch(builder, builder.add(at, builder.mul(weight_step, weight_step.type(PAIRS_AHEAD))), 0, STRIP_BYTES)
        weight = [builder.load(pointer(builder, at, v * TILE_BYTES, ints), align=4) for v in range(VECTORS)]
        for row in range(count):
            start = builder.add(row_address, builder.mul(row_step, row_step.type(row)))
            place = builder.add(start, builder.mul(loop.index, loop.index.type(4)))
            pair = builder.load(pointer(builder, place, 0, WORD), align=4)
            inputs = in_every_lane(builder, pair, MAX_LANES)
            for vector in range(VECTORS):
                total = builder.load(sums[row][vector])
                builder.store(add_pair_products(builder, total, inputs, weight[vector]), sums[row][vector])
    shifts = _shifts(builder, bias)
    for row in range(count):
        target, other = (
            builder.add(at, builder.mul(out_step, out_step.type(row))) for at in (out_address, other_address)
        )
        _finish(builder, [builder.load(total) for total in sums[row]], shifts, target, other, kind)


@code_for_constants
def multiply_tiles(_context, rows, weights, bias, out, other, steps, num_pairs, num_rows, ahead, ending):  # type: ignore[no-untyped-def]
    """``multiply_pairs`` with tile registers, for any number of rows: 32 at a time, and TILE_PAIRS pairs of inputs.

    Args:
        num_pairs: a multiple of TILE_PAIRS.
        ahead: address as ``weights`` of what is read next; it is asked for meanwhile.
    """
    (kind,) = values_of(ending)

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        row_address, weight_address, bias_address, out_address, other_address = arguments[:5]
        all_steps, pairs, count, ahead_address = arguments[5:9]
        row_step, out_step, weight_step = _all(builder, all_steps, 3)
        shifts = _shifts(builder, bias_address)
        sums = _aligned_bytes(builder, BLOCK_ROWS * SUM_BYTES)
        num_blocks = builder.udiv(builder.add(count, count.type(BLOCK_ROWS - 1)), count.type(BLOCK_ROWS))
        with cgutils.for_range(builder, num_blocks) as blocks:
            first = builder.mul(blocks.index, count.type(BLOCK_ROWS))
            here = _smaller(builder, builder.sub(count, first), BLOCK_ROWS)
            is_first = builder.icmp_unsigned("==", blocks.index, count.type(0))
            is_part = builder.icmp_unsigned("<", here, count.type(BLOCK_ROWS))
            with builder.if_then(builder.or_(is_first, is_part)):
                _configure(builder, here)
            source = builder.add(row_address, builder.mul(first, row_step))

            def products(num_row_tiles: int) -> None:
                for tile in itertools.chain(*SUMS[:num_row_tiles]):
                    _tile_call(builder, "tilezero", tile)
                sources = [
                    builder.add(source, builder.mul(row_step, row_step.type(t * TILE_ROWS)))
                    for t in range(num_row_tiles)
                ]
                with cgutils.for_range(builder, builder.udiv(pairs, pairs.type(TILE_PAIRS))) as loop:
                    along = builder.mul(loop.index, loop.index.type(TILE_BYTES))
                    down = builder.mul(builder.mul(loop.index, weight_step), weight_step.type(TILE_PAIRS))
                    for vector, tile in enumerate(WEIGHTS):
                        start = builder.add(weight_address, LONG(vector * TILE_BYTES))
                        _tile_call(builder, "tileloadd64", tile, builder.add(start, down), weight_step)
                        for upper, row_start in enumerate(sources):
                            if vector == 0:
                                at = builder.add(row_start, along)
                                # Rows stream by; the strip's weights, read again for the next rows, shall stay near.
                                _tile_call(builder, "tileloaddt164", ROWS[upper], at, row_step)
                            _tile_call(builder, "tdpbf16ps", SUMS[upper][vector], ROWS[upper], tile)
                    _ask_for_next(builder, builder.add(ahead_address, down), weight_step, blocks.index)
                for upper, row_sums in enumerate(SUMS[:num_row_tiles]):
                    for vector, total in enumerate(row_sums):
                        place = builder.add(sums, LONG(upper * TILE_ROWS * SUM_BYTES + vector * TILE_BYTES))
                        _tile_call(builder, "tilestored64", total, place, LONG(SUM_BYTES))

            with builder.if_else(builder.icmp_unsigned(">", here, count.type(TILE_ROWS))) as (two, one):
                with two:
                    products(2)
                with one:
                    products(1)
            with cgutils.for_range(builder, here) as row:
                totals = builder.add(sums, builder.mul(row.index, row.index.type(SUM_BYTES)))
                vectors = [load(builder, totals, v * MAX_LANES, MAX_LANES) for v in range(VECTORS)]
                down = builder.mul(builder.add(first, row.index), out_step)
                target, other = (builder.add(at, down) for at in (out_address, other_address))
                _finish(builder, vectors, shifts, target, other, kind)
        _tile_call(builder, "tilerelease")
        return context.get_dummy_value()

    arguments = (rows, weights, bias, out, other, steps, num_pairs, types.int64, ahead, ending)
    return types.void(*arguments), codegen


def _ask_for_next(builder: ir.IRBuilder, ahead: Any, weight_step: Any, block: Any) -> None:
    """This block of rows' share of the next strip's weights, so that memory is read as evenly as products go on."""
    number = builder.and_(block, block.type(TILE_PAIRS // LINES_ASKED - 1))
    line = builder.add(ahead, builder.mul(builder.mul(number, number.type(LINES_ASKED)), weight_step))
    for _ in range(LINES_ASKED):
        prefetch(builder, line, 0, STRIP_BYTES, into_level=2)
        line = builder.add(line, weight_step)


def _configure(builder: ir.IRBuilder, num_rows: Any) -> None:
    """Shapes of the tile registers for up to 32 rows, see LDTILECFG in Intel's manual."""
    upper = _smaller(builder, num_rows, TILE_ROWS)
    left = builder.sub(num_rows, upper)
    lower = builder.select(builder.icmp_unsigned(">", left, left.type(0)), left, left.type(1))
    config = _aligned_bytes(builder, 64)
    fields = [0] * 64
    fields[0] = 1  # the palette
    for tile in range(8):
        fields[16 + 2 * tile] = TILE_BYTES  # bytes of a row, 16 bits
        fields[48 + tile] = TILE_PAIRS
    kind = ir.VectorType(BYTE, 64)
    builder.store(ir.Constant(kind, fields), builder.inttoptr(config, kind.as_pointer()), align=64)
    for count, row_sums, tile in zip((upper, lower), SUMS, ROWS, strict=True):
        for register in (*row_sums, tile):
            builder.store(builder.trunc(count, BYTE), pointer(builder, config, 48 + register, BYTE))
    _tile_call(builder, "ldtilecfg", config)


def _tile_call(builder: ir.IRBuilder, name: str, *operands: Any) -> None:
    """An AMX instruction: tile registers are Python integers, then an address and a step where it takes them."""
    values = [BYTE(operand) if isinstance(operand, int) else operand for operand in operands]
    addresses = [i for i, operand in enumerate(operands) if not isinstance(operand, int)][:1]
    for i in addresses:
        values[i] = builder.inttoptr(values[i], BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


def _aligned_bytes(builder: ir.IRBuilder, num: int) -> Any:
    """Address of ``num`` bytes of the function's frame, at the start of a cache line."""
    with builder.goto_entry_block():  # cgutils.alloca_once would fill it with zeros, element by element
        memory = builder.alloca(ir.ArrayType(BYTE, num))
    memory.align = 64
    return builder.ptrtoint(memory, LONG)


def _smaller(builder: ir.IRBuilder, number: Any, most: int) -> Any:
    limit = number.type(most)
    return builder.select(builder.icmp_unsigned("<", number, limit), number, limit)


def _all(builder: ir.IRBuilder, several: Any, num: int) -> list[Any]:
    return [builder.extract_value(several, i) for i in range(num)]


def _shifts(builder: ir.IRBuilder, bias: Any) -> list[Any]:
    """The bias of each vector of outputs, or zeros."""
    zeros = ir.Constant(ir.VectorType(FLOAT, MAX_LANES), None)
    shifts = [cgutils.alloca_once_value(builder, zeros) for _ in range(VECTORS)]
    with builder.if_then(builder.icmp_unsigned("!=", bias, bias.type(0))):
        for vector, shift in enumerate(shifts):
            builder.store(load(builder, bias, vector * MAX_LANES, MAX_LANES, 2), shift)
    return [builder.load(shift) for shift in shifts]


def _finish(
    builder: ir.IRBuilder, sums: Sequence[Any], shifts: Sequence[Any], target: Any, other: Any, kind: int
) -> None:
    """Write one row's outputs; what ``other`` holds joins them after they are rounded."""
    for vector, (total, shift) in enumerate(zip(sums, shifts, strict=True)):
        output, place = builder.fadd(total, shift), vector * MAX_LANES
        if kind != PLAIN:
            output, beside = rounded(builder, output, MAX_LANES, 2), load(builder, other, place, MAX_LANES, 2)
            output = builder.fadd(beside, output) if kind == ADDED else builder.fmul(silu(builder, beside, 2), output)
        store_as(builder, target, place, output, 2)
