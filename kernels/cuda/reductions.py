"""Sums and maxima over the threads of a warp and of a block, in a fixed order: the same numbers give the same bits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cuda, float32, types

from tide_kernels.cuda.kernel import IS_SIMULATED

WARP = 32
ALL_LANES = 0xFFFFFFFF


@cuda.jit(device=True)
def warp_sum(value):  # type: ignore[no-untyped-def]
    """The sum over a warp's lanes, in all of them."""
    for step in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(ALL_LANES, value, step)
    return value


@cuda.jit(device=True)
def block_sum(value, scratch):  # type: ignore[no-untyped-def]
    """The sum over a block's threads, in all of them.

    ``scratch``: shared float32, one for each warp. Threads must be whole warps.
    """
    value = warp_sum(value)
    cuda.syncthreads()  # scratch may still be read from an earlier sum
    if cuda.threadIdx.x % WARP == 0:
        scratch[cuda.threadIdx.x // WARP] = value
    cuda.syncthreads()
    total = float32(0)
    for warp in range(cuda.blockDim.x // WARP):
        total += scratch[warp]
    return total


if IS_SIMULATED:

    @cuda.jit(device=True)
    def count_up(counters, i):  # type: ignore[no-untyped-def]
        """Add 1 to an int32 in memory and return what it was, as one step among all blocks."""
        return cuda.atomic.add(counters, i, 1)

else:
    from numba.cuda.extending import intrinsic

    @intrinsic
    def count_up(_typing_context, counters, i):  # type: ignore[no-untyped-def]
        """Add 1 to an int32 in memory and return what it was, as one step among all blocks."""

        # Numba's own atomics take arrays only.
        def codegen(_context: Any, builder: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
            cell = builder.gep(arguments[0], [arguments[1]])
            return builder.atomic_rmw("add", cell, ir.IntType(32)(1), "monotonic")

        return types.int32(counters, i), codegen
