"""What GPU kernels need on every architecture, by compiling them without a GPU, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from tide_kernels import gpu
from tide_ray.types import UserError

ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
"""What CUDA 13 compiles for, by generation; 7.0 takes CUDA 12."""


def run_kernel_resources(architectures: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Registers, shared memory, spills and float64 instructions by kernel and architecture.

    Args:
        architectures: compute capabilities, such as ``9.0``; none for ARCHITECTURES.
        names: beginnings of kernels' names; none for all.

    Raises:
        UserError: kernels cannot be compiled here, or not for an architecture.
    """
    architectures = architectures or ARCHITECTURES
    for architecture in architectures:
        if not re.fullmatch(r"\d+\.\d", architecture):
            raise UserError(f"architectures must be compute capabilities such as 9.0, got {architecture!r}")
    reason = gpu.why_no_compiler()
    if reason is not None:
        raise UserError(f"GPU kernels cannot be compiled here: {reason}")
    compiled = compile_kernels(architectures, names)
    kernels: dict[str, dict[str, Any]] = {}
    for used in compiled:
        entry = kernels.setdefault(
            used["name"], {"threads": used["threads"], "registers": {}, "shared_bytes": {}, "spill_bytes": {}}
        )
        for resource in ("registers", "shared_bytes", "spill_bytes"):
            entry[resource][used["architecture"]] = used[resource]
    return {
        "assembler": f"nvJitLink {version('nvidia-nvjitlink')}",
        "architectures": list(architectures),
        "float64_instructions": sum(used["float64_instructions"] for used in compiled),
        "spilling": sorted({used["name"] for used in compiled if used["spill_bytes"]}),
        "most_registers": max((used["registers"] for used in compiled), default=0),
        "kernels": kernels,
    }


def compile_kernels(architectures: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """What each kernel needs on each architecture, see ``tide_kernels.cuda.offline``. Raises UserError."""
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-W", "ignore", "-m", "tide_kernels.cuda.offline", ",".join(architectures), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"architectures: {last[0]}")
    return [json.loads(line) for line in done.stdout.splitlines()]
