"""RMS normalisation (arXiv 1910.07467) of bfloat16 rows on a CPU, in one pass over memory instead of seven.

``rms_norm`` is the Numba CPU kernel, ``rms_norm_reference`` the same in torch: what transformers' models compute, with
their two roundings, of the normalised row and of its product with the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numba import prange
from torch import Tensor

from tide_kernels.cpu import jit, launch
from tide_kernels.layer_vectors import scale_twice, sum_of_squares
from tide_kernels.vectors import MAX_LANES


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * rows / sqrt(mean(rows ** 2) + eps)`` over the last dimension.

    Args:
        rows: bfloat16 ``[..., D]``; D is a multiple of 16.
        weight: bfloat16 ``[D]``.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    width = rows.shape[-1]
    if weight.shape != (width,) or width % MAX_LANES or not rows.dtype == weight.dtype == torch.bfloat16:
        raise ValueError(
            f"rows {tuple(rows.shape)} in {rows.dtype} do not fit a weight {tuple(weight.shape)} in {weight.dtype}, "
            f"or are not of {MAX_LANES} x n numbers"
        )
    rows, weight = rows.contiguous(), weight.contiguous()
    out = torch.empty_like(rows)
    addresses = rows.data_ptr(), weight.data_ptr(), out.data_ptr()
    launch(_normalise, *addresses, rows.numel() // width, width, np.float32(eps))
    return out


def rms_norm_reference(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in torch."""
    wide = rows.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(rows.dtype)


def _compiled() -> Callable[..., None]:
    @jit(parallel=True, nogil=True, boundscheck=False, error_model="numpy")
    def normalise(rows, weight, out, num_rows, width, eps):  # type: ignore[no-untyped-def]
        for row in prange(num_rows):
            start = row * width * 2
            mean = sum_of_squares(rows + start, width // MAX_LANES) / np.float32(width)
            factor = np.float32(1) / np.float32(math.sqrt(mean + eps))
            scale_twice(rows + start, weight, out + start, width // MAX_LANES, factor)

    return normalise


_normalise = _compiled()
