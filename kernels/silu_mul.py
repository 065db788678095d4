"""SiLU of one half of each row times the other half: the middle of a gated feed-forward layer.

``silu_mul`` is a Numba kernel on a CPU and on a GPU; ``silu_mul_reference``, the same in torch, stands in on a GPU
without kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from numba import prange
from torch import Tensor
from torch.nn import functional as F

from tide_kernels import gpu
from tide_kernels.cpu import PARALLEL_FROM, is_for_kernels, jit, launch
from tide_kernels.layer_vectors import silu_times
from tide_kernels.vectors import MAX_LANES


def silu_mul(rows: Tensor) -> Tensor:
    """``silu(rows[..., :F]) * rows[..., F:]``.

    Args:
        rows: float32 or bfloat16 ``[..., 2 F]``, on a GPU also float16; on a CPU F is a multiple of 16.

    Returns:
        ``[..., F]``.

    Raises:
        ValueError: another width or dtype.
    """
    width = rows.shape[-1] // 2
    if rows.shape[-1] % 2 == 0 and gpu.run_on(rows):
        from tide_kernels.cuda.silu_mul import silu_mul_cuda

        return silu_mul_cuda(rows)
    if rows.shape[-1] % 2 == 0 and rows.device.type != "cpu":
        return silu_mul_reference(rows)
    if rows.shape[-1] % (2 * MAX_LANES) or not is_for_kernels(rows):
        raise ValueError(f"rows must be of 2 x {MAX_LANES} x n numbers, got {tuple(rows.shape)} in {rows.dtype}")
    rows = rows.contiguous()
    out = rows.new_empty((*rows.shape[:-1], width))
    arguments = rows.data_ptr(), out.data_ptr(), out.numel() // width, width
    launch(gate_rows(rows.element_size()), *arguments)
    return out


def silu_mul_reference(rows: Tensor) -> Tensor:
    """``silu_mul`` in torch."""
    gates, values = rows.chunk(2, dim=-1)
    return F.silu(gates) * values


@functools.cache
def gate_rows(item_bytes: int) -> Callable[..., None]:
    """The kernel over addresses."""
    alone, together = (_gate(item_bytes, is_parallel=is_parallel) for is_parallel in (False, True))

    @jit(nogil=True)
    def gate(rows, out, num_rows, width):  # type: ignore[no-untyped-def]
        if num_rows * width < PARALLEL_FROM:
            alone(rows, out, num_rows, width)
        else:
            together(rows, out, num_rows, width)

    return gate


def _gate(item_bytes: int, *, is_parallel: bool) -> Callable[..., None]:
    @jit(parallel=is_parallel, nogil=True, boundscheck=False)
    def gate_all(rows, out, num_rows, width):  # type: ignore[no-untyped-def]
        row_bytes = width * item_bytes
        for row in prange(num_rows):
            gates = rows + 2 * row * row_bytes
            silu_times(gates, gates + row_bytes, out + row * row_bytes, width // MAX_LANES, item_bytes)

    return gate_all
