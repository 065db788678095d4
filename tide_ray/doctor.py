"""What runs on this machine and why: versions, devices, and which kernels stand behind them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from tide_kernels import gpu
from tide_ray.models.loading import resolve_device, resolve_dtype

VERSIONS = ("tide-ray", "torch", "transformers", "ray", "numba", "numba-cuda")


def report() -> list[tuple[str, str]]:
    """Named findings in the order in which they are printed. No model is loaded, but kernels are compiled and
    a first one is run, to know whether they work."""
    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    return [
        ("versions", ", ".join(f"{name} {_version(name)}" for name in VERSIONS)),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cpu", f"{len(os.sched_getaffinity(0))} cores, {_cpu_products()}"),
        ("gpus", _gpus()),
        ("device auto", f"{device}, dtype auto {dtype}"),
        ("cpu kernels", _cpu_kernels()),
        ("gpu kernels", _gpu_kernels()),
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_products() -> str:
    """The instructions that products in bfloat16 use."""
    found = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX2": torch.cpu._is_avx2_supported(),
    }
    has = [name for name, is_there in found.items() if is_there]
    if "AMX" in has or "AVX-512 BF16" in has:
        return f"{', '.join(has[:2])}: bfloat16 is computed natively"
    return f"{has[0] if has else 'no vector extension'}: bfloat16 is slow, so float32 is the default"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return f"none that torch can use (torch is built for {_built_for()})"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    named = [f"{d.name}, compute capability {d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices]
    return f"{'; '.join(named)} (torch is built for {_built_for()})"


def _built_for() -> str:
    return "CPUs only" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _cpu_kernels() -> str:
    from tide_ray.models.packed_linear import kernels_work

    return "on" if kernels_work() else "on, but products are left to oneDNN (see the warning)"


def _gpu_kernels() -> str:
    try:
        chosen = gpu.choice()
    except gpu.UnknownChoice as error:
        return f"off: {error}"
    if chosen == "torch":
        return f"off: {gpu.VARIABLE}=torch"
    reason = gpu.why_not()
    if reason is not None:
        return f"off: {reason}" + (f"; {gpu.VARIABLE}=cuda makes that an error on a GPU" if chosen == "cuda" else "")
    named = f"on ({gpu.VARIABLE}={chosen}): {', '.join(gpu.ENGINE_KERNELS)}"
    return f"{named}; ready, but not used by the engine: {', '.join(gpu.OTHER_KERNELS)}"
