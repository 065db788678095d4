"""How CPU kernels are compiled and see tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba.core.caching import CacheImpl

from tide_kernels.cpu import as_words, jit


def test_a_kernel_compiles_where_compiled_code_can_be_kept_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba refuses to cache in a read-only container without a writable home, and the import failed with it."""
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])

    @jit(nogil=True)
    def double(numbers):  # type: ignore[no-untyped-def]
        for i in range(len(numbers)):
            numbers[i] *= 2

    numbers = np.arange(3)
    double(numbers)
    assert numbers.tolist() == [0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_words_are_the_memory_itself_or_a_copy_in_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3)
    words = as_words(tensor)
    assert words.shape == (2, 3)
    words[0, 1] = 0
    assert tensor[0, 1] == 0
    assert np.array_equal(as_words(tensor.T), words.T)
