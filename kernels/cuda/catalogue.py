"""The kernels that are compiled and counted without a GPU: each specialisation that differs in what it needs.

Names are ``kernel/dtype/facts``. What differs only in a number that no register depends on is listed once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tide_kernels.cuda.attention_merge import combine_kernel
from tide_kernels.cuda.compact import move_kernel, partition_kernel
from tide_kernels.cuda.exit_project import project_kernel
from tide_kernels.cuda.kernel import Kernel
from tide_kernels.cuda.kv_write import write_kernel
from tide_kernels.cuda.lane_attention import attend_kernel
from tide_kernels.cuda.launches import PARTITION_THREADS, SAMPLE_THREADS, SPECIALISED_WIDTHS
from tide_kernels.cuda.rms_norm import norm_kernel
from tide_kernels.cuda.rotary import rotary_kernel
from tide_kernels.cuda.route import route_kernel
from tide_kernels.cuda.sample import sample_kernel
from tide_kernels.cuda.silu_mul import silu_kernel
from tide_kernels.cuda.tensor_attention import product_kernel

GENERAL = 0
"""The width that stands for any other."""
ROUTES = ((4096, 128, "none"), (4096, 256, "rms"), (576, 64, "layer"), (GENERAL, 128, "rms"))
EXIT_HEADS = ((64, "none"), (128, "rms"), (256, "layer"))
KV_WRITES = (("none", False, True), ("half", False, True), ("half", True, True), ("interleaved", False, False))
ATTENTIONS = ((64, 3, 1), (64, 4, 1), (80, 1, 1), (128, 1, 1), (128, 4, 1), (128, 1, 3), (256, 2, 1), (256, 1, 2))
"""Width of a head, heads and rows that a block takes."""
PRODUCTS = ((64, 3, 1), (64, 7, 1), (128, 4, 1), (128, 8, 1), (128, 4, 2))
"""The same where tensor cores compute."""
UNSPLIT = ((128, 4, 1), (128, 1, 3))
"""Those also listed as many sequences run, which write their results at once."""
PAGE_SIZE = 32


def catalogue() -> dict[str, Callable[[], Kernel]]:
    """Every listed specialisation by name; the kernel is built when it is asked for."""
    listed: dict[str, Callable[[], Kernel]] = {}

    def add(name: str, make: Callable[..., Kernel], *facts: Any, **kinds: bool) -> None:
        listed[name] = functools.partial(make, *facts, **kinds)

    add("partition", partition_kernel, PARTITION_THREADS)
    for kind in ("gather", "scatter"):
        add(f"{kind}/16 bytes", move_kernel, 16, is_gather=kind == "gather", is_counted=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for width, bottleneck, kind in ROUTES:
            facts = kind, kind != "none", kind == "layer"
            add(f"route/{name}/{_width(width)}/{bottleneck}/{kind}", route_kernel, dtype, width, bottleneck, *facts)
        for rank, kind in EXIT_HEADS:
            facts = kind, kind != "none", kind == "layer"
            add(f"exit_project/{name}/{rank}/{kind}", project_kernel, dtype, rank, *facts, is_vector=True)
        for width in (*SPECIALISED_WIDTHS, GENERAL):
            add(f"rms_norm/{name}/{_width(width)}", norm_kernel, dtype, width, False)
            add(f"add_rms_norm/{name}/{_width(width)}", norm_kernel, dtype, width, True)
        for is_vector, reads in ((True, "16 bytes"), (False, "any")):
            add(f"silu_mul/{name}/{reads}", silu_kernel, dtype, is_vector=is_vector)
            add(f"rotate/{name}/{reads}", rotary_kernel, dtype, is_vector=is_vector)
            add(f"sample/{name}/{reads}", sample_kernel, dtype, SAMPLE_THREADS, is_vector=is_vector)
        for layout, is_normed, is_vector in KV_WRITES:
            traits = f"{layout}{'/norm' if is_normed else ''}/{'16 bytes' if is_vector else 'any'}"
            add(f"kv_write/{name}/{traits}", write_kernel, dtype, layout, False, is_normed, is_vector=is_vector)
        for head_dim, heads, rows in ATTENTIONS:
            for has_softcap in (False, True):
                traits = f"{head_dim}/{heads} heads/{rows} rows{'/softcap' * has_softcap}"
                kinds = {"is_extend": rows > 1, "is_vector": True}
                shape = head_dim, heads, rows, PAGE_SIZE, has_softcap
                add(f"attention/{name}/{traits}", attend_kernel, dtype, *shape, is_split=True, **kinds)
                if (head_dim, heads, rows) in UNSPLIT:
                    add(f"attention/{name}/{traits}/unsplit", attend_kernel, dtype, *shape, is_split=False, **kinds)
        for head_dim, heads, rows in PRODUCTS if dtype != torch.float32 else ():
            for has_softcap in (False, True):
                traits = f"{head_dim}/{heads} heads/{rows} rows{'/softcap' * has_softcap}"
                shape = head_dim, heads, rows, PAGE_SIZE, has_softcap
                for is_split in (True, False):
                    full = f"attention products/{name}/{traits}{'/unsplit' * (not is_split)}"
                    add(full, product_kernel, dtype, *shape, is_extend=rows > 1, is_split=is_split)
        add(f"combine/{name}", combine_kernel, dtype)
    return listed


def _width(width: int) -> str:
    return str(width) if width else "any"
