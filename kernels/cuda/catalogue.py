"""The kernels that are compiled and counted without a GPU: each specialisation that differs in what it needs.

Names are ``kernel/dtype/facts``. What differs only in a number that no register depends on is listed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tide_kernels.cuda.kernel import Kernel
from tide_kernels.cuda.route import route_kernel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GENERAL = 0
"""The width that stands for any other."""

ROUTES = ((4096, 128, "none"), (4096, 256, "rms"), (576, 64, "layer"), (GENERAL, 128, "rms"))


def catalogue() -> dict[str, Callable[[], Kernel]]:
    """Every listed specialisation by name; the kernel is built when it is asked for."""
    listed: dict[str, Callable[[], Kernel]] = {}
    for name, dtype in DTYPES.items():
        for width, bottleneck, kind in (
            (4096, 128, "none"),
            (4096, 256, "rms"),
            (576, 64, "layer"),
            (GENERAL, 128, "rms"),
        ):
            facts = dtype, width, bottleneck, kind, kind != "none", kind == "layer"
            listed[f"route/{name}/{_width(width)}/{bottleneck}/{kind}"] = functools.partial(route_kernel, *facts)
    return listed


def _width(width: int) -> str:
    return str(width) if width else "any"
