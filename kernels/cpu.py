"""What Numba CPU kernels share: how they are compiled and launched, and what they ask of tensors.

Threads come from Numba's OpenMP layer, which shares torch's OpenMP runtime: one pool, so the two never compete for
cores.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import numba
import torch
from numba import config, njit
from numba.core.dispatcher import Dispatcher
from torch import Tensor

config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]  # type: ignore[attr-defined]

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
PARALLEL_FROM = 2**14
"""Numbers from which passing over them takes longer than waking the other threads."""


@functools.cache
def source_digest() -> str:
    """SHA-256 of all kernel sources."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def jit(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``numba.njit`` that keeps compiled code on disk where there is a place to keep it."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        # Numba names machine code by the function and by how many it met before in the process. Of two functions of one
        # name, compiled for different constants by different processes, a third that loads both would run only one.
        function.__qualname__ += f"_{_identity(function, options)}"
        try:
            kernel = njit(cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written, as in many containers
            return njit(**options)(function)
        # Numba knows code on disk for stale by the kernel's own file, but what it calls lies in others; and for the
        # same by its pickled closure, in which another kernel is never the same as in the process before.
        cache, file = kernel._cache, kernel._cache._cache_file
        file._source_stamp = file._source_stamp, source_digest()
        cache._index_key = lambda signature, codegen: (signature, codegen.magic_tuple())
        return kernel

    return decorate


def _identity(function: Callable[..., None], options: Mapping[str, Any]) -> str:
    """Digest of what a function closes over and of how it is compiled, the same in every process."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    values = [value.py_func.__qualname__ if isinstance(value, Dispatcher) else repr(value) for value in cells]
    closure = list(zip(function.__code__.co_freevars, values, strict=True))
    settings = [(name, sorted(value) if isinstance(value, Set) else value) for name, value in sorted(options.items())]
    return hashlib.sha256(repr((closure, settings)).encode()).hexdigest()[:12]


def launch(kernel: Callable[..., None], *arguments: Any) -> None:
    """Call a parallel kernel with as many threads as this thread's torch has, and leave torch with as many."""
    num_threads = torch.get_num_threads()
    numba.set_num_threads(max(1, min(num_threads, config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]
    try:
        kernel(*arguments)
    finally:
        if torch.get_num_threads() != num_threads:  # Numba's first launch sets OpenMP's default to all cores
            torch.set_num_threads(num_threads)


def is_for_kernels(*tensors: Tensor) -> bool:
    """Whether all tensors lie on a CPU in one dtype that CPU kernels take."""
    dtype = tensors[0].dtype
    return dtype in KERNEL_DTYPES and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)


def with_whole_heads(rows: Tensor) -> Tensor:
    """``[N, H, d]`` whose heads lie one after another in every row; a copy where they do not."""
    return rows if rows.stride(2) == 1 and rows.stride(1) == rows.shape[2] else rows.contiguous()
