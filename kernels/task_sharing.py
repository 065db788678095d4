"""Tasks of a parallel kernel, shared out so that a thread that is held up holds nobody up for long.

Every thread starts with as many neighbouring tasks as any other and takes them in order, as memory likes them read. One
that has no more takes the last one of another's. With fixed shares, a thread that the system interrupts (on small
machines Ray's own processes do it a thousand times a second) stops all others at the end of the loop for as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from tide_kernels.cpu import jit
from tide_kernels.vectors import LINE_BYTES, code_for_constants, pointer

MAX_WORKERS = 256
_WORD = ir.IntType(64)
_HALF = 32
_END = 2**_HALF - 1


@code_for_constants
def new_ranges(_context):  # type: ignore[no-untyped-def]
    """Address of a cache line for each worker, in the frame of the function that this is called from."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, _arguments: Sequence[Any]) -> Any:
        with builder.goto_entry_block():  # cgutils.alloca_once would fill it with zeros, element by element
            memory = builder.alloca(ir.ArrayType(ir.IntType(8), MAX_WORKERS * LINE_BYTES))
        memory.align = LINE_BYTES
        return builder.ptrtoint(memory, _WORD)

    return types.int64(), codegen


@code_for_constants
def _num_threads(_context):  # type: ignore[no-untyped-def]
    """``numba.get_num_threads``, by the name that parallel loops call, as code that is kept on disk can."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, _arguments: Sequence[Any]) -> Any:
        kind = ir.FunctionType(_WORD, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "get_num_threads"), [])

    return types.int64(), codegen


@code_for_constants
def _read(_context, address):  # type: ignore[no-untyped-def]
    """The int64 at an address that other threads write."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.load_atomic(pointer(builder, arguments[0], 0, _WORD), "monotonic", 8)

    return types.int64(types.int64), codegen


@code_for_constants
def _write(_context, address, value):  # type: ignore[no-untyped-def]
    """Put an int64 at an address that other threads read."""

    def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        builder.store_atomic(arguments[1], pointer(builder, arguments[0], 0, _WORD), "monotonic", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@code_for_constants
def _replace(_context, address, expected, value):  # type: ignore[no-untyped-def]
    """Whether the int64 at an address was ``expected``; ``value`` is there then."""

    def codegen(_codegen_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Sequence[Any]) -> Any:
        place = pointer(builder, arguments[0], 0, _WORD)
        outcome = builder.cmpxchg(place, arguments[1], arguments[2], "monotonic", "monotonic")
        return cgutils.as_bool_bit(builder, builder.extract_value(outcome, 1))

    return types.boolean(types.int64, types.int64, types.int64), codegen


@jit(nogil=True)
def share_out(num_tasks, ranges):  # type: ignore[no-untyped-def]
    """Write every worker's first task and the end of its tasks to ``ranges``; returns the number of workers."""
    num_workers = max(1, min(_num_threads(), num_tasks, MAX_WORKERS))
    for worker in range(num_workers):
        first, end = num_tasks * worker // num_workers, num_tasks * (worker + 1) // num_workers
        _write(ranges + worker * LINE_BYTES, first << _HALF | end)
    return num_workers


@jit(nogil=True)
def take_task(ranges, worker, num_workers):  # type: ignore[no-untyped-def]
    """A task that nobody else has taken: the worker's next one, else the last one of another; -1 once none is left."""
    for n in range(num_workers):
        place = ranges + (worker + n) % num_workers * LINE_BYTES
        while True:
            both = _read(place)
            first, end = both >> _HALF, both & _END
            if first >= end:
                break
            if n == 0:
                if _replace(place, both, both + (1 << _HALF)):
                    return first
            elif _replace(place, both, both - 1):
                return end - 1
    return -1
