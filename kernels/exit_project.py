"""A low-rank exit head and the final norm in one launch, written to where the LM head will read.

``exit_project`` chooses: the CUDA kernel on GPUs, ``exit_project_reference`` elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.cuda.launches import EXIT_MAX_RANK
from tide_kernels.route import Normalisation


@dataclass(frozen=True, slots=True)
class LowRankWeights:
    """An exit head of rank R in the states' dtype, on one device.

    ``down``: ``[D, R]`` and ``up``: ``[R, D]``, so that neighbouring outputs lie together; ``bias``: ``[D]``.
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    @property
    def rank(self) -> int:
        """Width between the two products."""
        return self.down.shape[1]


def exit_project(states: Tensor, head: LowRankWeights, norm: Normalisation, out: Tensor, slots: Tensor) -> None:
    """``out[slots] = norm(states @ down @ up + bias)``.

    Args:
        states: float32, float16 or bfloat16 ``[N, D]``.
        norm: the model's final norm; of kind ``none`` for the pre-norm state.
        out: contiguous ``[P, D]`` of the same dtype, written in place.
        slots: long ``[N]``, rows of ``out`` that differ.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(states, head, norm, out, slots)
    unfit = gpu.over("an exit head's rank", head.rank, EXIT_MAX_RANK)
    if gpu.run_on(states, head.down, head.up, head.bias, out, slots, unfit=unfit):
        from tide_kernels.cuda.exit_project import exit_project_cuda

        exit_project_cuda(states, head, norm, out, slots)
    else:
        exit_project_reference(states, head, norm, out, slots)


def exit_project_reference(
    states: Tensor, head: LowRankWeights, norm: Normalisation, out: Tensor, slots: Tensor
) -> None:
    """``exit_project`` in torch."""
    out[slots] = norm(torch.addmm(head.bias, states @ head.down, head.up))


def _check(states: Tensor, head: LowRankWeights, norm: Normalisation, out: Tensor, slots: Tensor) -> None:
    num_rows, width = states.shape
    shapes = head.down.shape, head.up.shape, head.bias.shape
    if shapes != ((width, head.rank), (head.rank, width), (width,)) or out.shape[1:] != (width,):
        raise ValueError(f"states {tuple(states.shape)} do not fit a head {shapes} and rows {tuple(out.shape)}")
    if slots.shape != (num_rows,) or slots.dtype != torch.long or not out.is_contiguous():
        raise ValueError(f"slots must be long [{num_rows}] in contiguous rows, got {slots.dtype} {tuple(slots.shape)}")
    parts = head.down, head.up, head.bias, out, *(v for v in (norm.weight, norm.bias) if v is not None)
    if any(part.dtype != states.dtype or part.device != states.device for part in (*parts,)):
        raise ValueError(f"head, norm and rows must be {states.dtype} on {states.device} like the states")
