"""How CPU kernels are compiled and what they ask of tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numba import config
from numba.core.caching import CacheImpl

from tide_kernels import cpu
from tide_kernels.cpu import jit, with_whole_heads


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


def test_code_on_disk_is_stale_once_any_kernel_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel was not compiled again after an edit to the vector code that it calls in another file."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))

    def misses() -> int:
        @jit()
        def add_one(number):  # type: ignore[no-untyped-def]
            return number + 1

        assert add_one(1) == 2
        return sum(add_one.stats.cache_misses.values())

    assert [misses(), misses()] == [1, 0]
    monkeypatch.setattr(cpu, "source_digest", lambda: "of edited files")
    assert [misses(), misses()] == [1, 0]


def test_heads_of_a_row_are_copied_only_where_they_do_not_lie_together() -> None:
    rows = torch.arange(2 * 3 * 8).view(2, 24)
    wide = rows[:, :16].unflatten(1, (2, 8))  # as queries lie in a joint projection
    assert with_whole_heads(wide).data_ptr() == rows.data_ptr()
    apart = rows.view(3, 2, 8).transpose(0, 1)
    assert with_whole_heads(apart).is_contiguous()
    assert torch.equal(with_whole_heads(apart), apart)
