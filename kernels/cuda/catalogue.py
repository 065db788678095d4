"""The kernels that are compiled and counted without a GPU: each specialisation that differs in what it needs.

Names are ``kernel/dtype/facts``. What differs only in a number that no register depends on is listed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from tide_kernels.cuda.compact import move_kernel, partition_kernel
from tide_kernels.cuda.exit_project import project_kernel
from tide_kernels.cuda.kernel import Kernel
from tide_kernels.cuda.kv_write import write_kernel
from tide_kernels.cuda.launches import PARTITION_THREADS, SAMPLE_THREADS, SPECIALISED_WIDTHS
from tide_kernels.cuda.paged_attention import attend_kernel, combine_kernel
from tide_kernels.cuda.rms_norm import norm_kernel
from tide_kernels.cuda.route import route_kernel
from tide_kernels.cuda.sample import sample_kernel
from tide_kernels.cuda.silu_mul import silu_kernel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GENERAL = 0
"""The width that stands for any other."""

ROUTES = ((4096, 128, "none"), (4096, 256, "rms"), (576, 64, "layer"), (GENERAL, 128, "rms"))

KV_WRITES = (("none", False, True), ("half", False, True), ("half", True, True), ("interleaved", False, False))

ATTENTIONS = ((64, 3, 1), (64, 4, 1), (80, 1, 1), (128, 1, 1), (128, 4, 1), (128, 1, 4), (256, 2, 1), (256, 1, 2))
"""Width of a head, heads and rows that a block takes."""
PAGE_SIZE = 32


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
        for rank, kind in ((64, "none"), (128, "rms"), (256, "layer")):
            facts = dtype, rank, kind, kind != "none", kind == "layer"
            make = functools.partial(project_kernel, *facts, is_vector=True)
            listed[f"exit_project/{name}/{rank}/{kind}"] = make
        for width in (*SPECIALISED_WIDTHS, GENERAL):
            for has_update in (False, True):
                kind = "add_rms_norm" if has_update else "rms_norm"
                facts = dtype, width, has_update
                listed[f"{kind}/{name}/{_width(width)}"] = functools.partial(norm_kernel, *facts)
        for is_vector in (True, False):
            fact = "16 bytes" if is_vector else "any"
            listed[f"silu_mul/{name}/{fact}"] = functools.partial(silu_kernel, dtype, is_vector=is_vector)
            make = functools.partial(sample_kernel, dtype, SAMPLE_THREADS, is_vector=is_vector)
            listed[f"sample/{name}/{fact}"] = make
        for layout, is_normed, is_vector in KV_WRITES:
            facts = dtype, layout, False, is_normed
            traits = f"{layout}{'/norm' if is_normed else ''}/{'16 bytes' if is_vector else 'any'}"
            listed[f"kv_write/{name}/{traits}"] = functools.partial(write_kernel, *facts, is_vector=is_vector)
        for head_dim, heads, rows in ATTENTIONS:
            for has_softcap, is_split in ((False, False), (False, True), (True, True)):
                traits = f"{head_dim}/{heads} heads/{rows} rows{'/softcap' * has_softcap}{'/split' * is_split}"
                facts = dtype, head_dim, heads, rows, PAGE_SIZE, has_softcap
                kinds = {"is_extend": rows > 1, "is_split": is_split, "is_vector": True}
                make = functools.partial(attend_kernel, *facts, **kinds)
                listed[f"attention/{name}/{traits}"] = make
        listed[f"combine/{name}"] = functools.partial(combine_kernel, dtype)
    listed["partition"] = functools.partial(partition_kernel, PARTITION_THREADS)
    for kind in ("gather", "scatter"):
        listed[f"{kind}/16 bytes"] = functools.partial(move_kernel, 16, is_gather=kind == "gather", is_counted=True)
    return listed


def _width(width: int) -> str:
    return str(width) if width else "any"
