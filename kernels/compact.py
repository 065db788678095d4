"""Parts the rows of a launch without asking the host: who exits, who goes on, and their rows and metadata moved there.

``partition`` orders row numbers and counts both kinds on the device; ``gather_rows`` and ``scatter_rows`` move rows by
number, as many of them as a count on the device says. Each chooses: a CUDA kernel on GPUs, its reference elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tide_kernels import gpu


def partition(exits: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers, those that exit first, each kind in rising order; and how many there are of each.

    Args:
        exits: bool ``[N]``.

    Returns:
        order long ``[N]``, and counts int32 ``[2]``: rows that exit, rows that go on.

    Raises:
        ValueError: another shape or dtype.
    """
    if exits.ndim != 1 or exits.dtype != torch.bool:
        raise ValueError(f"exits must be bool [N], got {exits.dtype} {tuple(exits.shape)}")
    if _run_on(exits):
        from tide_kernels.cuda.compact import partition_cuda

        return partition_cuda(exits)
    return partition_reference(exits)


def partition_reference(exits: Tensor) -> tuple[Tensor, Tensor]:
    """``partition`` in torch."""
    num_exits = exits.sum(dtype=torch.int32)
    return torch.argsort(~exits, stable=True), torch.stack((num_exits, len(exits) - num_exits)).int()


def gather_rows(rows: Tensor, index: Tensor, count: Tensor | None = None) -> Tensor:
    """``rows[index]``, of whatever the rows are made.

    Args:
        rows: ``[M, ...]`` of any dtype.
        index: long ``[n]``, row numbers below M.
        count: int32 ``[1]`` on the device: only the first ``count`` rows are wanted, the others are left as they are in
            memory; None for all.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(rows, index, count)
    if _run_on(rows, index):
        from tide_kernels.cuda.compact import move_rows

        out = rows.new_empty((len(index), *rows.shape[1:]))
        move_rows(rows.contiguous(), out, index, count, is_gather=True)
        return out
    return gather_rows_reference(rows, index, count)


def gather_rows_reference(rows: Tensor, index: Tensor, count: Tensor | None = None) -> Tensor:
    """``gather_rows`` in torch; rows that are not wanted repeat the first wanted one."""
    if count is None:
        return rows.index_select(0, index)
    is_wanted = torch.arange(len(index), device=index.device) < count
    return rows.index_select(0, torch.where(is_wanted, index, index[:1]))


def scatter_rows(rows: Tensor, index: Tensor, out: Tensor, count: Tensor | None = None) -> None:
    """``out[index] = rows``, for row numbers that differ.

    Args:
        rows: ``[n, ...]`` of any dtype.
        index: long ``[n]``, row numbers in ``out``.
        out: contiguous ``[M, ...]`` of the same dtype, written in place.
        count: int32 ``[1]`` on the device: only the first ``count`` rows are written; None for all.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(out, index, count)
    if rows.shape != (len(index), *out.shape[1:]) or rows.dtype != out.dtype or not out.is_contiguous():
        raise ValueError(
            f"rows {tuple(rows.shape)} in {rows.dtype} do not fit {len(index)} rows of a contiguous "
            f"{tuple(out.shape)} in {out.dtype}"
        )
    if _run_on(rows, index, out):
        from tide_kernels.cuda.compact import move_rows

        move_rows(rows.contiguous(), out, index, count, is_gather=False)
    else:
        scatter_rows_reference(rows, index, out, count)


def scatter_rows_reference(rows: Tensor, index: Tensor, out: Tensor, count: Tensor | None = None) -> None:
    """``scatter_rows`` in torch."""
    wanted = len(index) if count is None else int(count)
    out[index[:wanted]] = rows[:wanted]


def _run_on(*tensors: Tensor) -> bool:
    """Rows are moved as bytes, so that their dtype does not matter."""
    return gpu.run_on(*tensors, dtype=torch.float32)


def _check(rows: Tensor, index: Tensor, count: Tensor | None) -> None:
    if index.ndim != 1 or index.dtype != torch.long or rows.ndim == 0:
        raise ValueError(f"an index must be long [n], got {index.dtype} {tuple(index.shape)}")
    if count is not None and (count.numel() != 1 or count.dtype != torch.int32):
        raise ValueError(f"a count must be one int32, got {count.dtype} {tuple(count.shape)}")
    if index.device != rows.device or (count is not None and count.device != rows.device):
        raise ValueError(f"rows on {rows.device}, their index on {index.device}: all must lie on one device")
