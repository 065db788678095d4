"""What Numba CPU kernels share: how they are compiled and launched, and how they see tensors.

Threads come from Numba's OpenMP layer, which shares torch's OpenMP runtime: one pool, so the two never compete for
cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import config, njit
from torch import Tensor

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def jit(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``numba.njit`` that keeps compiled code on disk where there is a place to keep it."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written, as in many containers
            return njit(**options)(function)

    return decorate


def launch(kernel: Callable[..., None], *arguments: Any) -> None:
    """Call a parallel kernel with as many threads as this thread's torch has, and leave torch with as many."""
    num_threads = torch.get_num_threads()
    numba.set_num_threads(max(1, min(num_threads, config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    try:
        kernel(*arguments)
    finally:
        if torch.get_num_threads() != num_threads:  # Numba's first launch sets OpenMP's default to all cores
            torch.set_num_threads(num_threads)


def as_words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory (a copy's, unless it is contiguous) as integers of the same size.

    For kernels that copy, or take addresses, and so do not care what the bits mean; NumPy has no bfloat16.
    """
    return tensor.contiguous().view(_WORDS[tensor.element_size()]).numpy()
