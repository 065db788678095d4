"""A Numba CUDA kernel over flat memory: tensors reach it as bare addresses, so it has three arguments where arrays take
fourteen, and a launch costs microseconds less. Shapes, dtypes and strides are checked by the kernel's Python function.

Kernels are compiled at their first launch on a device, never at import: without a driver that fails. Launch each once
before a CUDA graph is captured, as loading code cannot be captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from numba import config, cuda, types
from torch import Tensor

IS_SIMULATED = bool(config.ENABLE_CUDASIM)  # type: ignore[attr-defined]
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # type: ignore[attr-defined]  # few rows fill no GPU, which is no news

INT, FLOAT = types.int32, types.float32
LONG = types.int64


def pointer(dtype: torch.dtype) -> Any:
    """The parameter type of a tensor: 16-bit floats come as bit patterns, see ``elements``."""
    return types.CPointer(_CELLS[dtype])


_CELLS = {
    torch.float32: types.float32,
    torch.float16: types.uint16,
    torch.bfloat16: types.uint16,
    torch.bool: types.uint8,
    torch.uint8: types.uint8,
    torch.int32: types.int32,
    torch.int64: types.int64,
    torch.uint64: types.uint64,
}


class Kernel:
    """A kernel for one set of compile-time facts.

    Args:
        function: the kernel as a Python function over pointers and numbers.
        parameters: types of its arguments: ``pointer(dtype)``, INT, LONG or FLOAT.
        max_threads: of a block; the compiler keeps to the registers that so many leave to each.
        oldest: compute capability below which the kernel has no machine code.
    """

    def __init__(
        self, function: Callable[..., None], *parameters: Any, max_threads: int, oldest: tuple[int, int] = (7, 0)
    ) -> None:
        self.function = function
        self.signature = types.void(*parameters)
        self.max_threads = max_threads
        self.oldest = oldest
        self._compiled: Any = None

    def launch(self, blocks: tuple[int, ...], threads: int, *arguments: Tensor | int | float) -> None:
        """Run on torch's current stream of the device that the first tensor lies on; empty grids do nothing."""
        assert threads <= self.max_threads, f"{threads = }, compiled for {self.max_threads}"
        if 0 in blocks:
            return
        if IS_SIMULATED:
            cuda.jit(self.function)[blocks, threads](*map(_simulated, arguments))
            return
        device = next(argument for argument in arguments if isinstance(argument, Tensor)).device
        with torch.cuda.device(device):
            if self._compiled is None:
                self._compiled = cuda.jit(self.signature, launch_bounds=self.max_threads)(self.function)
            stream = _stream(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
            self._compiled[blocks, threads, stream](
                *(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
            )


@functools.cache
def _stream(device_index: int, handle: int) -> Any:
    """Numba's object for a stream of torch: one, as Numba keeps the launch configuration of each."""
    return cuda.external_stream(handle)


def _simulated(argument: Tensor | int | float) -> Any:
    """What a kernel sees in the simulator: all memory from a tensor's first number on, as a flat NumPy array."""
    if not isinstance(argument, Tensor):
        return argument
    size = argument.untyped_storage().nbytes() // argument.element_size() - argument.storage_offset()
    flat = argument.as_strided((size,), (1,))
    views = {torch.float16: torch.uint16, torch.bfloat16: torch.uint16, torch.bool: torch.uint8}
    return flat.view(views.get(flat.dtype, flat.dtype)).numpy()


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; a few in the simulator, so that work is split there too."""
    return 2 if IS_SIMULATED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _kept_counters(device: torch.device, stream: int, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def zeroed_counters(device: torch.device, count: int) -> Tensor:
    """int32 zeros for blocks to count themselves; a kernel leaves them at zero, so that they serve the next launch.

    One set for each stream, as launches on one stream do not overlap; a graph being captured gets its own.
    """
    rounded = -(-count // 1024) * 1024
    if device.type != "cuda":
        return torch.zeros(rounded, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(rounded, dtype=torch.int32, device=device)
    return _kept_counters(device, torch.cuda.current_stream(device).cuda_stream, rounded)
