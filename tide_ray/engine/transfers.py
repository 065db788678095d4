"""Between the host and a device without waiting: small arrays go up in one copy, results come down while work goes on.

On a CPU there is nothing to move, and both share memory with what they are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes: of the longest loads that kernels make."""


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Each array as a tensor on ``device``, all of them in one copy that the host does not wait for."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    # torch keeps pinned memory from being given out again before copies from it are done.
    return unpacked(packed(arrays, pin=True).to(device, non_blocking=True), arrays)


def upload_one(array: np.ndarray, device: torch.device) -> Tensor:
    """One array as a tensor on ``device``, see ``upload``."""
    return upload([array], device)[0]


def packed(arrays: Sequence[np.ndarray], *, pin: bool) -> Tensor:
    """The bytes of all arrays, each from an aligned place on, uint8 in (pinned) host memory."""
    starts = _starts(arrays)
    staging = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pin)
    cells = staging.numpy()
    for start, array in zip(starts, arrays, strict=False):
        cells[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return staging


def unpacked(staging: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """The parts of what ``packed`` made of these arrays, wherever that lies now."""
    return [
        staging[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(_starts(arrays), arrays, strict=False)
    ]


def _starts(arrays: Sequence[np.ndarray]) -> list[int]:
    """Where each array begins, and the size of all."""
    sizes = (-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)
    return list(itertools.accumulate(sizes, initial=0))


class Download:
    """A tensor on its way to the host: copied behind what computes it, waited for when it is read.

    Work that is queued afterwards is not waited for.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The numbers, in host memory."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
