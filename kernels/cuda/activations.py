"""Functions of float32 that kernels apply to numbers, without float64 anywhere."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32

from tide_kernels.cuda.kernel import IS_SIMULATED

if IS_SIMULATED:  # where Python's own would raise for what a GPU takes in its stride

    def exp(x):  # type: ignore[no-untyped-def]
        with np.errstate(over="ignore", under="ignore"):
            return np.exp(float32(x))

    def reciprocal_root(x):  # type: ignore[no-untyped-def]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float32(1) / np.sqrt(float32(x))

else:

    @cuda.jit(device=True)
    def exp(x):  # type: ignore[no-untyped-def]
        return math.exp(x)

    @cuda.jit(device=True)
    def reciprocal_root(x):  # type: ignore[no-untyped-def]
        return float32(1) / math.sqrt(x)


@cuda.jit(device=True)
def sigmoid(x):  # type: ignore[no-untyped-def]
    return float32(1) / (float32(1) + exp(-x))


@cuda.jit(device=True)
def silu(x):  # type: ignore[no-untyped-def]
    return x / (float32(1) + exp(-x))
