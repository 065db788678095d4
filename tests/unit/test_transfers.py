"""Small arrays in one buffer, with every part where it was; results read once they are there."""

from __future__ import annotations

import numpy as np
import torch

from tide_ray.engine.transfers import ALIGNMENT, Download, packed, unpacked, upload

ARRAYS = [
    np.array([5, -7, 2**40]),
    np.zeros((0, 3), dtype=np.int32),
    np.arange(15, dtype=np.int32).reshape(3, 5)[:, ::2],
    np.array([0.5, np.inf, -3.0, 1e-30, 2.0], dtype=np.float32),
    np.array([[True], [False]]),
    np.array([1.5]),
]


def test_packed_arrays_come_apart_as_they_were_on_aligned_places() -> None:
    staging = packed(ARRAYS, pin=False)
    parts = unpacked(staging.clone(), ARRAYS)
    assert staging.dtype == torch.uint8
    for part, array in zip(parts, ARRAYS, strict=True):
        assert part.is_contiguous()
        assert part.storage_offset() * part.element_size() % ALIGNMENT == 0
        np.testing.assert_array_equal(part.numpy(), array)
        assert part.numpy().dtype == array.dtype


def test_a_cpu_shares_memory_with_what_is_uploaded_and_read() -> None:
    array = np.array([1, 2, 3])
    (tensor,) = upload([array], torch.device("cpu"))
    array[0] = 9
    assert tensor.tolist() == [9, 2, 3]
    assert Download(tensor).read() is tensor
