"""The kernel benchmarks as far as a machine without a GPU goes, and what they print of measured facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bench_report_device import print_kernel_resources_report, print_kernels_report

from programs import benchmarked, measured
from tide_kernels import gpu


@pytest.mark.skipif(gpu.why_no_compiler() is not None, reason=str(gpu.why_no_compiler()))
def test_resources_are_printed_and_written(tmp_path: Path) -> None:
    written = tmp_path / "resources.json"
    facts = measured(
        "kernel-resources", "--architectures", "8.0,9.0", "--names", "partition,gather", "--output", written
    )
    assert "most registers" in facts.pop("printed")
    assert json.loads(written.read_text()) == facts
    assert set(facts["kernels"]) == {"partition", "gather/16 bytes"}
    assert facts["architectures"] == list(facts["kernels"]["partition"]["registers"]) == ["8.0", "9.0"]
    assert facts["float64_instructions"] == 0


@pytest.mark.skipif(gpu.why_no_compiler() is not None, reason=str(gpu.why_no_compiler()))
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("8.0,x", "architectures must be compute capabilities such as 9.0, got 'x'"),
        ("8.0,99.0", "architectures: 99.0 cannot be compiled for ("),
    ],
)
def test_an_architecture_that_there_is_not_is_named(architectures: str, message: str) -> None:
    done = benchmarked("kernel-resources", "--architectures", architectures, "--names", "gather")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_a_kernel_that_an_architecture_has_not_leaves_its_column_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers of kernels for tensor cores stood one column to the left, below an architecture that has none."""
    used = {"registers": {"8.0": 33}, "shared_bytes": {"8.0": 44}, "spill_bytes": {"8.0": 0}}
    facts = {"hardware": "none", "num_threads": 1, "date": "2026-11-27", "assembler": "nvJitLink 13"}
    facts |= {"architectures": ["7.5", "8.0"], "float64_instructions": 0, "spilling": [], "most_registers": 33}
    print_kernel_resources_report({**facts, "kernels": {"products": used}})
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "products" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["products", "", "33 / 44"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_without_a_gpu_is_one_line() -> None:
    done = benchmarked("kernels")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: kernels: ")
    assert len(done.stderr.splitlines()) == 1


def test_measured_kernels_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"kernel": "route", "rows": 8, "bytes": 1e6, "us": 2.0, "share_of_copies": 0.8}
    row |= {"eager_us": 9.0, "compiled_us": None, "tide_bytes": None}
    facts = {"hardware": "a GPU", "num_threads": 1, "date": "2026-11-26", "dtype": "bfloat16", "hidden": 4096}
    facts |= {"context": 4096, "copy_bytes_per_second": 3e12, "launch_us": 7.0, "kernels": [row]}
    print_kernels_report(facts)
    printed = capsys.readouterr().out
    assert "80%" in printed
    assert "3,000 GB/s" in printed
