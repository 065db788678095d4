"""Where an engine's time goes: its parts timed around one run, and the matrix products inside its layers.

Parts are timed by wrapping the engine's own methods for the run (on a CPU every call is synchronous). The matrix
products come from torch's profiler in a second run, as a share of that run's layer time, so that its overhead does not
count against them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tide_ray import TideEngine
from tide_ray.engine.rows import LaunchCache

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")


def profile_engine(engine: TideEngine, run: Callable[[], Any]) -> dict[str, float]:
    """Shares of the wall time of ``run``; they add up to 1.

    ``gemm``: matrix products in the layers; ``attention``: K/V writes and attention; ``elementwise``: the rest of the
    layers; ``head``: final norm and LM head; ``sampler``; ``prologue``: embeddings and per-layer arguments;
    ``python``: scheduling, packing rows, committing, decoding text and what no part claims.
    """
    with _timed(engine) as seconds:
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    layers = seconds["layers"] - seconds["attention"]
    gemm = layers * _gemm_share(engine, run)
    parts = {
        "gemm": gemm,
        "attention": seconds["attention"],
        "elementwise": layers - gemm,
        "head": seconds["head"],
        "sampler": seconds["sampler"],
        "prologue": seconds["prologue"],
    }
    parts["python"] = wall - sum(parts.values())
    return {name: round(part / wall, 3) for name, part in parts.items()}


def _gemm_share(engine: TideEngine, run: Callable[[], Any]) -> float:
    """Matrix products over all that layers do besides attention, under torch's profiler."""
    with _timed(engine) as seconds, profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    total = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    head = seconds["head"]
    gemm = sum(total.get(name, 0.0) for name in MATRIX_PRODUCTS) - head
    return max(0.0, min(1.0, gemm / (seconds["layers"] - seconds["attention"])))


@contextmanager
def _timed(engine: TideEngine) -> Iterator[dict[str, float]]:
    """Seconds spent in the engine's parts while the block runs."""
    adapter, sampler = engine.runner.adapter, engine.runner.sampler
    seconds: dict[str, float] = defaultdict(float)
    wrapped = [
        (adapter, "run_layer", "layers"),
        (adapter, "head", "head"),
        (adapter, "final_norm", "head"),
        (adapter, "prologue", "prologue"),
        (sampler, "sample", "sampler"),
        (LaunchCache, "update", "attention"),
        (LaunchCache, "attend", "attention"),
    ]
    originals = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name, _ in wrapped]
    for (owner, name, part), (_, _, original, _) in zip(wrapped, originals, strict=True):
        setattr(owner, name, _timer(original, seconds, part))
    try:
        yield seconds
    finally:
        for owner, name, original, was_own in originals:
            if was_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


def _timer(function: Callable[..., Any], seconds: dict[str, float], part: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[part] += time.perf_counter() - start

    return timed
