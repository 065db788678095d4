"""CUDA kernels compile for every architecture without a GPU, and fit its registers."""

from __future__ import annotations

from typing import Any

import pytest
from bench_kernel_resources import ARCHITECTURES, compile_kernels

from tide_kernels import gpu

IMPORTANT = (
    "partition",
    "gather/16 bytes",
    "route/bfloat16/4096/128",
    "exit_project/bfloat16/128",
    "add_rms_norm/bfloat16/4096",
    "silu_mul/bfloat16/16 bytes",
    "kv_write/bfloat16/half/16 bytes",
    "route/float32/4096/128",
    "attention/bfloat16/128/4 heads/1 rows",
    "attention/bfloat16/128/1 heads/3 rows/unsplit",
    "attention/float16/128/4 heads/1 rows/unsplit",
    "attention products/bfloat16/128/4 heads/1 rows/unsplit",
    "attention products/float16/64/7 heads/1 rows/softcap",
    "combine/bfloat16",
    "sample/bfloat16/16 bytes",
)
"""Specialisations that every run compiles; ``python jobs/benchmark.py kernel-resources`` compiles all of them."""


@pytest.fixture(scope="module")
def compiled_kernels() -> list[dict[str, Any]]:
    """What each kernel needs on each architecture."""
    if (reason := gpu.why_no_compiler()) is not None:
        pytest.skip(reason)
    return compile_kernels(ARCHITECTURES, IMPORTANT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills_and_without_float64(
    compiled_kernels: list[dict[str, Any]], architecture: str
) -> None:
    mine = [kernel for kernel in compiled_kernels if kernel["architecture"] == architecture]
    expected = [name for name in IMPORTANT if architecture != "7.5" or not name.startswith("attention products")]
    missing = [name for name in expected if not any(kernel["name"].startswith(name) for kernel in mine)]
    assert not missing
    assert "attention/bfloat16/128/4 heads/1 rows/unsplit" in {kernel["name"] for kernel in mine}
    for kernel in mine:
        print(f"{kernel['name']}: {kernel['registers']} registers, {kernel['shared_bytes']} bytes shared")
        assert kernel["float64_instructions"] == 0, kernel
        assert kernel["spill_bytes"] == 0, kernel
        assert 0 < kernel["registers"] * kernel["threads"] <= 65536, kernel


def test_what_is_lowered_for_another_architecture_is_what_is_lowered_for_its_own(
    compiled_kernels: list[dict[str, Any]],
) -> None:
    """Numba lowers a kernel once, for the oldest; code sizes alone differ, by the lengths of names."""
    names = ("silu_mul/bfloat16/16 bytes", "route/bfloat16/4096/128", "attention products/bfloat16/128/4 heads/1 rows")
    alone = compile_kernels(["9.0"], names)
    beside = {kernel["name"]: kernel for kernel in compiled_kernels if kernel["architecture"] == "9.0"}
    found = [kernel for kernel in alone if kernel["name"] in beside]
    assert len(found) >= 3
    for kernel in found:
        assert {**kernel, "code_bytes": 0} == {**beside[kernel["name"]], "code_bytes": 0}
