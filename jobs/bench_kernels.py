"""GPU kernels at decode sizes: time under graph replay, as a share of what copying the same bytes takes, beside torch.

Bytes are what a call must read and write once: rows, weights, pages. Calls of a graph have inputs and weights of their
own and keep their outputs, several times what the L2 cache holds, so that it does not serve what memory would in a
model; a case too small for that has no share. A reference that does not fit into memory is left out.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tide_kernels import gpu
from tide_kernels.compact import gather_rows, gather_rows_reference, partition, partition_reference
from tide_kernels.exit_project import LowRankWeights, exit_project, exit_project_reference
from tide_kernels.kv_write import Rotation, write_kv_layers, write_kv_layers_reference
from tide_kernels.paged_attention import (
    paged_decode_attention,
    paged_decode_attention_reference,
    paged_extend_attention,
)
from tide_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tide_kernels.route import GateWeights, Normalisation, route, route_reference
from tide_kernels.sample import SamplingRules, sample_tokens
from tide_kernels.silu_mul import silu_mul, silu_mul_reference
from tide_ray.types import UserError

REPEATS, MIN_CALLS, MAX_CALLS = 20, 32, 16384
CACHES = 4
"""How many times the L2 cache the inputs of a graph's calls take together."""
COPIED_BYTES = 512 << 20
BOTTLENECK, HEAD_DIM, KV_HEADS, GROUP, PAGE_SIZE, LAYERS, VOCABULARY = 128, 128, 8, 4, 32, 8, 128256
EXTEND_ROWS = 4
"""Rows of a sequence that attend together."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one size.

    ``make`` gives the arguments of a call; ``reference``: torch's twin, or None. ``scratch_bytes``: what the twin needs
    besides them. ``tide_bytes``: what TIDE's CUDA kernel of the same name would read and write, or None.
    """

    name: str
    num_bytes: int
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    reference: Callable[..., Any] | None
    scratch_bytes: int = 0
    tide_bytes: int | None = None


def run_kernels(
    *, dtype: str, rows: Sequence[int], hidden: int, context: int, torch_rows: Sequence[int] | None = None
) -> dict[str, Any]:
    """Measure every kernel for every number of rows, and torch's twins for ``torch_rows`` (default: the same).

    Raises:
        UserError: there is no GPU, kernels cannot run on it, or ``TIDE_KERNELS`` keeps them off.
    """
    try:
        if gpu.choice() == "torch":
            raise UserError(f"kernels: {gpu.VARIABLE}=torch would measure torch in their place")
    except gpu.UnknownChoice as error:
        raise UserError(str(error)) from error
    reason = gpu.why_not()
    if reason is not None:
        raise UserError(f"kernels: {reason}")
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise UserError(f"dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    with _kernels_forced():
        bandwidth = copy_bandwidth()
        measured = [
            {"rows": count, **_measured(case, bandwidth, with_torch=torch_rows is None or count in torch_rows)}
            for count in rows
            for case in cases(count, hidden, context, kinds[dtype])
        ]
        return {
            "dtype": dtype,
            "hidden": hidden,
            "context": context,
            "copy_bytes_per_second": bandwidth,
            "l2_bytes": _l2_bytes(),
            "launch_us": launch_seconds() * 1e6,
            "kernels": measured,
        }


@contextmanager
def _kernels_forced() -> Iterator[None]:
    """No torch in a kernel's place."""
    before = os.environ.get(gpu.VARIABLE)
    os.environ[gpu.VARIABLE] = "cuda"
    try:
        yield
    finally:
        del os.environ[gpu.VARIABLE]
        if before is not None:
            os.environ[gpu.VARIABLE] = before


def _measured(case: Case, bandwidth: float, *, with_torch: bool) -> dict[str, Any]:
    """What is reported of a case; a time that there is no memory for is None."""
    seconds = _fitting(case.run, case)
    eager = compiled = None
    if with_torch and case.reference is not None and case.scratch_bytes < _free_bytes():
        eager, compiled = _fitting(case.reference, case), _fitting(torch.compile(case.reference), case)
    is_cold = num_calls(case.num_bytes, _l2_bytes()) * case.num_bytes >= CACHES * _l2_bytes()

    def us(value: float | None) -> float | None:
        return None if value is None else value * 1e6

    return {
        "kernel": case.name,
        "bytes": case.num_bytes,
        "tide_bytes": case.tide_bytes,
        "us": us(seconds),
        "share_of_copies": case.num_bytes / seconds / bandwidth if is_cold and seconds is not None else None,
        "eager_us": us(eager),
        "compiled_us": us(compiled),
    }


def _fitting(function: Callable[..., Any], case: Case) -> float | None:
    """``replayed``, or None where memory runs out."""
    try:
        return replayed(function, case)
    except torch.OutOfMemoryError:
        return None


def num_calls(num_bytes: int, l2_bytes: int) -> int:
    """Calls in a graph, each with inputs of its own, so that they outgrow the cache."""
    return max(MIN_CALLS if num_bytes < l2_bytes else 1, min(MAX_CALLS, math.ceil(CACHES * l2_bytes / num_bytes)))


def cases(num_rows: int, hidden: int, context: int, dtype: torch.dtype, *, device: str = "cuda") -> list[Case]:
    """The kernels at one number of rows. Everything large is made by ``make``, so that one case is there at a time."""
    size = dtype.itemsize
    order = torch.randperm(num_rows, device=device)
    ones, longs = torch.ones(num_rows, device=device), torch.arange(num_rows, device=device)
    rules = SamplingRules(ones, torch.zeros_like(longs).int(), ones * 0.9, ones * 0, longs, longs)
    filled = num_rows * LAYERS * 2 * KV_HEADS * HEAD_DIM
    gate_bytes, head_bytes = hidden * BOTTLENECK * 4, 2 * hidden * BOTTLENECK * size
    row_bytes = num_rows * hidden * size
    sequences, each = max(1, num_rows // EXTEND_ROWS), min(num_rows, EXTEND_ROWS)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    def states() -> tuple[Tensor, ...]:
        return (random(num_rows, hidden),)

    def normed() -> tuple[Tensor, ...]:
        return random(num_rows, hidden), random(hidden)

    def gated() -> tuple[Any, ...]:
        shapes = (hidden, BOTTLENECK), (BOTTLENECK,), (BOTTLENECK,), (3,)
        return *states(), GateWeights(*(torch.randn(shape, device=device) for shape in shapes)), ones

    def projected() -> tuple[Any, ...]:
        head = LowRankWeights(random(hidden, BOTTLENECK), random(BOTTLENECK, hidden), random(hidden))
        return *states(), head, Normalisation("rms", 1e-5, random(hidden)), random(num_rows, hidden), order

    def kv_written() -> tuple[Any, ...]:
        pools = random(2, LAYERS, num_rows, KV_HEADS, PAGE_SIZE, HEAD_DIM)  # a page to each row
        both = random(num_rows, LAYERS, 2, KV_HEADS, HEAD_DIM)
        rotation = Rotation(random(num_rows, HEAD_DIM), random(num_rows, HEAD_DIM))
        return *pools, order, order % PAGE_SIZE, both[:, :, 0], both[:, :, 1], rotation

    def attended(count: int) -> tuple[Tensor, ...]:
        pages_each = -(-context // PAGE_SIZE)
        pool = count * pages_each, KV_HEADS, PAGE_SIZE, HEAD_DIM
        table = torch.randperm(pool[0], device=device).int().view(count, pages_each)
        return random(*pool), random(*pool), table

    def decoded() -> tuple[Tensor, ...]:
        lengths = torch.full((num_rows,), context, dtype=torch.int32, device=device)
        return random(num_rows, KV_HEADS * GROUP, HEAD_DIM), *attended(num_rows), lengths

    def extended() -> tuple[Tensor, ...]:
        starts = torch.arange(sequences + 1, device=device).int() * each
        lengths = (context - each + 1 + torch.arange(each, device=device)).clamp(min=1).int().repeat(sequences)
        return random(sequences * each, KV_HEADS * GROUP, HEAD_DIM), *attended(sequences), starts, lengths

    def norm(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: function(*inputs, 1e-5)

    def write(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *inputs: function(*inputs[:-1], rotation=inputs[-1])

    def attend(function: Callable[..., Tensor], **options: int) -> Callable[..., Tensor]:
        return lambda *inputs: function(*inputs, scale=HEAD_DIM**-0.5, **options)

    def kv_bytes(count: int) -> int:
        return 2 * count * context * KV_HEADS * HEAD_DIM * size

    wide_copies = 3 * kv_bytes(num_rows) + 3 * kv_bytes(num_rows) * 4 // size  # gathered and laid out; in float32
    return [
        Case("partition", num_rows * 9 + 8, lambda: (torch.rand(num_rows, device=device) < 0.5,), partition,
             partition_reference),
        Case("gather_rows", 2 * row_bytes, lambda: (*states(), order), gather_rows, gather_rows_reference),
        Case("exit_project", 2 * row_bytes + head_bytes, projected, exit_project, exit_project_reference),
        Case("route", row_bytes + gate_bytes, gated, route, route_reference,
             tide_bytes=row_bytes + num_rows * gate_bytes),  # a block to each row, which reads all weights
        Case("rms_norm", 2 * row_bytes, normed, norm(rms_norm), norm(rms_norm_reference)),
        Case("add_rms_norm", 4 * row_bytes, lambda: (*states(), *normed()), norm(add_rms_norm),
             norm(add_rms_norm_reference)),
        Case("silu_mul", 3 * num_rows * 4 * hidden * size, lambda: (random(num_rows, 8 * hidden),), silu_mul,
             silu_mul_reference),
        Case("write_kv_layers", 2 * filled * size, kv_written, write(write_kv_layers),
             write(write_kv_layers_reference)),
        Case("paged_decode_attention", kv_bytes(num_rows), decoded, attend(paged_decode_attention),
             attend(paged_decode_attention_reference), scratch_bytes=wide_copies),
        Case("paged_extend_attention", kv_bytes(sequences), extended,
             attend(paged_extend_attention, max_rows=each), None),  # whose twin waits for the device
        Case("sample_tokens", num_rows * VOCABULARY * size, lambda: (random(num_rows, VOCABULARY),),
             lambda x: sample_tokens(x, rules), None),
    ]  # fmt: skip


def replayed(function: Callable[..., Any], case: Case) -> float:
    """Seconds of one call, the median over replays of a graph of calls on different inputs."""
    calls = num_calls(case.num_bytes, _l2_bytes())
    torch.cuda.empty_cache()
    inputs = [case.make() for _ in range(calls)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and load before anything is captured
            function(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [function(*given) for given in inputs]
    seconds = _median(graph.replay) / calls
    del outputs
    return seconds


def _l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def _free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def copy_bandwidth() -> float:
    """Bytes read and written each second by a copy that no cache holds."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
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
