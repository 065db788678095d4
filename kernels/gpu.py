"""Whether GPU kernels run, and why not where they do not: the one place that every kernel's function asks.

``TIDE_KERNELS=torch`` keeps to torch on GPUs, ``TIDE_KERNELS=cuda`` makes a missing kernel an error; without it torch
stands in after one warning that names the reason. On CPUs the variable changes nothing. Nothing here imports
``numba.cuda`` before a tensor lies on a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

VARIABLE = "TIDE_KERNELS"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ENGINE_KERNELS = (
    "route", "gather_rows", "write_kv", "paged_attention", "rms_norm", "rotate", "silu_mul", "sample_tokens"
)  # fmt: skip
OTHER_KERNELS = ("partition", "scatter_rows", "exit_project")
"""Those that nothing in the engine calls."""
OLDEST_CAPABILITY, NEWEST_CAPABILITY = (7, 0), (12, 9)


class KernelsUnavailable(RuntimeError):
    """GPU kernels were asked for by name and cannot run."""


class _Capturing(Exception):
    """Whether kernels run has not been asked yet, and cannot be while a CUDA graph is captured."""


class UnknownChoice(ValueError):
    """The variable holds what it does not take."""


def choice() -> str:
    """What the user chose: ``torch``, ``cuda``, or ``auto``.

    Raises:
        UnknownChoice: the variable holds anything else.
    """
    given = os.environ.get(VARIABLE, "auto") or "auto"
    if given not in ("auto", "torch", "cuda"):
        raise UnknownChoice(f"{VARIABLE} must be torch or cuda, got {given!r}")
    return given


@functools.cache
def is_simulated() -> bool:
    """Whether Numba simulates CUDA in Python, so that kernels run on tensors in the CPU's memory (for tests)."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


def run_on(*tensors: Tensor, dtype: torch.dtype | None = None, unfit: str | None = None) -> bool:
    """Whether a GPU kernel takes tensors of one device whose numbers are of ``dtype`` (default: the first's).

    ``unfit``: why a kernel does not take their shapes, None where it does.

    Raises:
        KernelsUnavailable: ``TIDE_KERNELS=cuda`` on a GPU where kernels cannot run, or for what they do not take.
    """
    device = tensors[0].device
    others = [tensor.device for tensor in tensors if tensor.device != device]
    return runs(device, dtype or tensors[0].dtype, f"tensors lie on {device} and {others[0]}" if others else unfit)


def runs(device: torch.device, dtype: torch.dtype, unfit: str | None = None) -> bool:
    """``run_on`` for tensors that do not exist yet.

    Raises:
        KernelsUnavailable: as ``run_on``.
        UnknownChoice: on a GPU, as ``choice``.
    """
    if device.type != ("cpu" if is_simulated() else "cuda"):
        return False
    chosen = choice()
    if chosen == "torch" or (is_simulated() and chosen != "cuda"):
        return False
    reason = _why_not_now(device.index or 0) or _why_not_dtype(dtype) or unfit
    if reason is None:
        return True
    if chosen == "cuda":
        raise KernelsUnavailable(f"{VARIABLE}=cuda, but {reason}")
    _warn(reason)
    return False


def _why_not_now(device_index: int) -> str | None:
    try:
        return why_not(device_index)
    except _Capturing:
        return "no kernel ran before a CUDA graph was captured: run once what is captured"


@functools.cache
def why_not(device_index: int = 0) -> str | None:
    """Why kernels cannot run on a GPU of this machine; None where they can. The driver is asked last."""
    if is_simulated():
        return None
    missing = why_no_compiler()
    if missing is not None:
        return missing
    if not torch.cuda.is_available():
        built = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return f"there is no usable GPU: {built}"
    capability = torch.cuda.get_device_capability(device_index)
    if not OLDEST_CAPABILITY <= capability <= NEWEST_CAPABILITY:
        return f"compute capability {_dotted(capability)} is outside {_dotted(OLDEST_CAPABILITY)} to 12.x"
    try:
        if not importlib.import_module("numba.cuda").is_available():
            return "numba-cuda finds no driver that it supports"
        if torch.cuda.is_current_stream_capturing():
            raise _Capturing  # so that no answer is kept
        return _first_failure(torch.device("cuda", device_index))
    except _Capturing:
        raise
    except Exception as error:  # the driver's or a compiler's, of which there is no list
        return f"the first kernel failed: {_first_line(error)}"


def _first_failure(device: torch.device) -> str | None:
    """What a small kernel does wrong there. It is compiled, so a toolkit that is too new or too old shows here."""
    from tide_kernels.cuda.silu_mul import silu_mul_cuda
    from tide_kernels.silu_mul import silu_mul_reference

    rows = torch.linspace(-4, 4, 2 * 64, device=device).bfloat16()[None]
    is_right = torch.allclose(silu_mul_cuda(rows), silu_mul_reference(rows), rtol=0.02, atol=0.01)
    return None if is_right else "the first kernel gave wrong numbers"


@functools.cache
def why_no_compiler() -> str | None:
    """Why kernels cannot be compiled here, with or without a GPU; None where they can."""
    try:
        version("numba-cuda")
    except PackageNotFoundError:
        return "numba-cuda is not installed (pip install 'tide-ray[cuda]')"
    try:
        cuda = importlib.import_module("numba.cuda")
    except Exception as error:  # a library's loader, of which there is no list of errors
        return f"numba-cuda cannot be imported: {_first_line(error)}"
    if "numba_cuda" not in (cuda.__file__ or ""):
        return "numba-cuda is installed where Python does not read its .pth file, so Numba's own CUDA target loads"
    for package, module in (("nvidia-nvvm", "nvvm"), ("nvidia-cuda-nvrtc", "nvrtc"), ("nvidia-nvjitlink", "nvJitLink")):
        if not _finds_library(module):
            return f"{package} is missing (pip install 'tide-ray[cuda]')"
    return None


def _finds_library(name: str) -> bool:
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")
        pathfinder.load_nvidia_dynamic_lib(name)
    except Exception:  # the loader's own errors, which differ from version to version
        return False
    return True


def _why_not_dtype(dtype: torch.dtype) -> str | None:
    if dtype in DTYPES:
        return None
    return f"kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"


def over(what: str, number: int, highest: int) -> str | None:
    """That a number is above the highest which a kernel takes; None where it is not."""
    return None if number <= highest else f"kernels take {what} of at most {highest}, not {number}"


@functools.cache
def _warn(reason: str) -> None:
    """Once for each reason."""
    logger.warning("GPU kernels are off, torch runs in their place: %s", reason)


def _first_line(error: Exception) -> str:
    """What an error says in short, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
