"""GPU kernels at decode sizes: time under graph replay, as a share of what copying the same bytes takes, beside torch.

Bytes are what a call must read and write once: rows, weights, pages. Inputs of many calls lie side by side and are
gone through in turn, so that the cache does not serve what memory would in a model.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.compact import gather_rows, gather_rows_reference
from tide_kernels.exit_project import LowRankWeights, exit_project, exit_project_reference
from tide_kernels.kv_write import Rotation, write_kv_layers, write_kv_layers_reference
from tide_kernels.paged_attention import paged_decode_attention, paged_decode_attention_reference
from tide_kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from tide_kernels.route import GateWeights, Normalisation, route, route_reference
from tide_kernels.sample import SamplingRules, sample_tokens
from tide_kernels.silu_mul import silu_mul, silu_mul_reference
from tide_ray.types import UserError

REPEATS, CALLS = 20, 32
COLD_BYTES = 256 << 20
"""That the inputs of different calls take together: more than any cache."""
BOTTLENECK, HEAD_DIM, KV_HEADS, GROUP, PAGE_SIZE, LAYERS, VOCABULARY = 128, 128, 8, 4, 32, 8, 128256


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size: ``make`` gives the arguments of a call; torch's twin may be None."""

    name: str
    num_bytes: int
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    reference: Callable[..., Any] | None


def run_kernels(*, dtype: str, rows: Sequence[int], hidden: int, context: int) -> dict[str, Any]:
    """Measure every kernel for every number of rows.

    Raises:
        UserError: there is no GPU, or kernels cannot run on it.
    """
    reason = gpu.why_not()
    if reason is not None:
        raise UserError(f"kernels: {reason}")
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise UserError(f"dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    bandwidth = copy_bandwidth()
    measured = []
    for count in rows:
        for case in cases(count, hidden, context, kinds[dtype]):
            seconds = replayed(case.run, case)
            eager = compiled = None
            if case.reference is not None:
                eager, compiled = replayed(case.reference, case), replayed(torch.compile(case.reference), case)
            measured.append(
                {
                    "kernel": case.name,
                    "rows": count,
                    "bytes": case.num_bytes,
                    "us": seconds * 1e6,
                    "share_of_copies": case.num_bytes / seconds / bandwidth,
                    "eager_us": None if eager is None else eager * 1e6,
                    "compiled_us": None if compiled is None else compiled * 1e6,
                }
            )
    return {
        "dtype": dtype,
        "hidden": hidden,
        "context": context,
        "copy_bytes_per_second": bandwidth,
        "launch_us": launch_seconds() * 1e6,
        "kernels": measured,
    }


def cases(num_rows: int, hidden: int, context: int, dtype: torch.dtype) -> list[Case]:
    """The kernels at one number of rows."""
    size = dtype.itemsize

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    weight, thresholds = random(hidden), torch.full((num_rows,), 0.5, device="cuda")
    gate = GateWeights(
        *(torch.randn(shape, device="cuda") for shape in ((hidden, BOTTLENECK), BOTTLENECK, BOTTLENECK, 3))
    )
    lengths = torch.full((num_rows,), context, dtype=torch.int32, device="cuda")
    pages_each = -(-context // PAGE_SIZE)
    num_pages = pages_each * num_rows
    table = torch.randperm(num_pages, device="cuda").int().view(num_rows, pages_each)
    places = torch.randperm(num_pages * PAGE_SIZE, device="cuda")[:num_rows]
    cos, sin = random(num_rows, HEAD_DIM), random(num_rows, HEAD_DIM)
    filled = num_rows * LAYERS * 2 * KV_HEADS * HEAD_DIM

    def attention_inputs() -> tuple[Tensor, ...]:
        pool = num_pages, KV_HEADS, PAGE_SIZE, HEAD_DIM
        return random(num_rows, KV_HEADS * GROUP, HEAD_DIM), random(*pool), random(*pool), table, lengths

    def attend(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs, scale=HEAD_DIM**-0.5)

    pools = random(2, LAYERS, num_pages, KV_HEADS, PAGE_SIZE, HEAD_DIM)

    def fill(function: Callable[..., None]) -> Callable[..., None]:
        def run(flat: Tensor) -> None:
            both = flat.unflatten(1, (LAYERS, 2, KV_HEADS, HEAD_DIM))
            at = places // PAGE_SIZE, places % PAGE_SIZE
            function(*pools, *at, both[:, :, 0], both[:, :, 1], rotation=Rotation(cos, sin))

        return run

    ones, longs = torch.ones(num_rows, device="cuda"), torch.arange(num_rows, device="cuda")
    rules = SamplingRules(ones, torch.zeros_like(longs).int(), ones * 0.9, ones * 0, longs, longs)
    gate_bytes = gate.down.numel() * 4
    row_bytes = num_rows * hidden * size
    attended = 2 * num_rows * context * KV_HEADS * HEAD_DIM * size
    order = torch.randperm(num_rows, device="cuda")
    head = LowRankWeights(random(hidden, BOTTLENECK), random(BOTTLENECK, hidden), random(hidden))
    norm, pooled = Normalisation("rms", 1e-5, weight), random(num_rows, hidden)
    head_bytes = 2 * head.down.numel() * size
    return [
        Case("gather_rows", 2 * row_bytes, lambda: (random(num_rows, hidden),), lambda x: gather_rows(x, order),
             lambda x: gather_rows_reference(x, order)),
        Case("exit_project", 2 * row_bytes + head_bytes, lambda: (random(num_rows, hidden),),
             lambda x: exit_project(x, head, norm, pooled, order),
             lambda x: exit_project_reference(x, head, norm, pooled, order)),
        Case("route", row_bytes + gate_bytes, lambda: (random(num_rows, hidden),), lambda x: route(x, gate, thresholds),
             lambda x: route_reference(x, gate, thresholds)),
        Case("add_rms_norm", 4 * row_bytes, lambda: (random(num_rows, hidden), random(num_rows, hidden)),
             lambda x, y: add_rms_norm(x, y, weight, 1e-5), lambda x, y: add_rms_norm_reference(x, y, weight, 1e-5)),
        Case("silu_mul", 3 * num_rows * 4 * hidden * size, lambda: (random(num_rows, 8 * hidden),), silu_mul,
             silu_mul_reference),
        Case("write_kv_layers", 2 * filled * size, lambda: (random(num_rows, filled // num_rows),),
             fill(write_kv_layers), fill(write_kv_layers_reference)),
        Case("paged_decode_attention", attended, attention_inputs, attend(paged_decode_attention),
             attend(paged_decode_attention_reference)),
        Case("sample_tokens", num_rows * VOCABULARY * size, lambda: (random(num_rows, VOCABULARY),),
             lambda x: sample_tokens(x, rules), None),
    ]  # fmt: skip


def replayed(function: Callable[..., Any], case: Case) -> float:
    """Seconds of one call, the median over replays of a graph of CALLS calls on different inputs."""
    copies = max(1, min(CALLS, math.ceil(COLD_BYTES / case.num_bytes)))
    inputs = [case.make() for _ in range(copies)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and load before anything is captured
            function(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in range(CALLS):
            function(*inputs[call % copies])
    return _median(graph.replay) / CALLS


def copy_bandwidth() -> float:
    """Bytes read and written each second by a copy of twice COLD_BYTES."""
    source = torch.empty(2 * COLD_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / _median(lambda: target.copy_(source))


def launch_seconds() -> float:
    """What a launch costs the host: calls of a kernel whose work is nothing."""
    rows, weight = torch.zeros(2, 1, 64, device="cuda")
    add_rms_norm(rows, rows, weight[0], 1e-5)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(1000):
        add_rms_norm(rows, rows, weight[0], 1e-5)
    seconds = (time.perf_counter() - start) / 1000
    torch.cuda.synchronize()
    return seconds


def _median(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(seconds)
