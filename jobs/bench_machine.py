"""The machine that a figure was measured on, and whether it was busy with something else."""

from __future__ import annotations

import contextlib
import os
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

BUSY_SHARE = 0.5
"""Load average for each core above which figures are not to be trusted."""


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine_facts(num_threads: int) -> dict[str, Any]:
    """Hardware, versions, date, and the load before the benchmark's own."""
    load_average = round(os.getloadavg()[0], 2)
    return {
        "date": date.today().isoformat(),
        "hardware": _hardware(),
        "num_threads": num_threads,
        "load_average": load_average,
        "is_busy": load_average > BUSY_SHARE * num_cores(),
        "versions": {name: _version(name) for name in ("tide-ray", "torch", "transformers", "ray", "numba-cuda")},
    }


def _version(name: str) -> str | None:
    """None where it is not installed: the engine and its kernels run without Ray."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hardware() -> str:
    """The accelerator, or the CPU with its cores and the instructions that matter."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name, flags = "CPU", ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value
                break
    kinds = [kind for kind in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if kind in flags.split()]
    return f"{name}, {num_cores()} cores, {kinds[0] if kinds else 'no vector extension'}"
