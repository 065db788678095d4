"""What Numba CPU kernels share: how they are compiled, and how they see tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def jit(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``numba.njit`` that keeps compiled code on disk where there is a place to keep it."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written, as in many containers
            return njit(**options)(function)

    return decorate


def as_words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory (a copy's, unless it is contiguous) as integers of the same size.

    For kernels that copy, or take addresses, and so do not care what the bits mean; NumPy has no bfloat16.
    """
    return tensor.contiguous().view(_WORDS[tensor.element_size()]).numpy()
