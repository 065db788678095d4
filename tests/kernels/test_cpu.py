"""How CPU kernels are compiled and what they ask of tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llvmlite.binding import get_host_cpu_features
from numba import config, prange
from numba.core.caching import CacheImpl

from tide_kernels import cpu
from tide_kernels.cpu import jit, with_whole_heads

ATTENTION_TEST = "test_decode_attention_equals_plain_attention"


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


CACHE_SCRIPT = """
import torch
from tide_kernels.paged_attention import paged_decode_attention
from tide_kernels.paged_attention_cpu import attend_kernel
pages, table, lengths = torch.ones(4, 2, 8, 16), torch.zeros(3, 2).int(), torch.full((3,), 9).int()
assert bool((paged_decode_attention(torch.ones(3, 4, 16), pages, pages, table, lengths, scale=0.3) == 1).all())
stats = attend_kernel(16, 2, 8, 4).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_a_kernel_that_calls_others_is_found_on_disk_by_the_next_process(tmp_path: Path) -> None:
    """Every process compiled such kernels again, and left its copy on disk."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", CACHE_SCRIPT], env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"]]


NORM_SCRIPT = """
import sys
import torch
from tide_kernels.rms_norm import rms_norm, rms_norm_reference
for name in sys.argv[1:]:
    rows, weight = torch.randn(4, 64).to(getattr(torch, name)), torch.ones(64).to(getattr(torch, name))
    torch.testing.assert_close(rms_norm(rows, weight, 1e-5), rms_norm_reference(rows, weight, 1e-5))
"""


def test_code_that_different_processes_compiled_is_not_mixed_up(tmp_path: Path) -> None:
    """A kernel for bfloat16 called one for float32 and wrote past its rows: both had the same name on disk."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for dtypes in (["bfloat16"], ["float32"], ["float32", "bfloat16"]):
        command = [sys.executable, "-c", NORM_SCRIPT, *dtypes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


def test_parallel_code_is_not_taken_for_the_same_kernel_without_threads(tmp_path: Path) -> None:
    """Once on disk, norms of many rows ran in one thread."""

    def threads_asked(kernel: Callable[..., int]) -> bool:
        return "numba_parallel_for" in next(iter(kernel.inspect_llvm().values()))  # type: ignore[attr-defined]

    def kernels() -> list[Callable[..., int]]:
        made = []
        for is_parallel in (False, True):

            @jit(parallel=is_parallel)
            def fill(numbers):  # type: ignore[no-untyped-def]
                for i in prange(len(numbers)):
                    numbers[i] = i

            fill(np.zeros(4))
            made.append(fill)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "CACHE_DIR", str(tmp_path))
        assert [threads_asked(kernel) for kernel in kernels()] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("cpu_name", ["x86-64-v3", "skylake-avx512"])
def test_kernels_are_right_without_products_of_bfloat16_pairs(cpu_name: str) -> None:
    """Code for CPUs with AVX2, and with AVX-512 but no bfloat16, run on this one."""
    if {"x86-64-v3": "avx2", "skylake-avx512": "avx512bw"}[cpu_name] not in enabled_features():
        pytest.skip(f"this CPU cannot run code for {cpu_name}")
    files = [
        Path(__file__).with_name(name) for name in ("test_tiled_linear.py", "test_silu_mul.py", "test_rms_norm.py")
    ]
    tests = [*map(str, files), f"{Path(__file__).with_name('test_paged_attention.py')}::{ATTENTION_TEST}"]
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu_name, "NUMBA_CPU_FEATURES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def enabled_features() -> set[str]:
    return {name for name, is_there in get_host_cpu_features().items() if is_there}


def test_heads_of_a_row_are_copied_only_where_they_do_not_lie_together() -> None:
    rows = torch.arange(2 * 3 * 8).view(2, 24)
    wide = rows[:, :16].unflatten(1, (2, 8))  # as queries lie in a joint projection
    assert with_whole_heads(wide).data_ptr() == rows.data_ptr()
    apart = rows.view(3, 2, 8).transpose(0, 1)
    assert with_whole_heads(apart).is_contiguous()
    assert torch.equal(with_whole_heads(apart), apart)
