"""Where an engine's time goes: its parts timed around one run.

The engine's own methods and the linear modules of its layers are wrapped for that run, a microsecond for each call. On
a CPU every call is synchronous; on a GPU each timed call waits for the device, so shares hold but the run is slower.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tide_ray import TideEngine
from tide_ray.engine import runner
from tide_ray.engine.rows import LaunchCache
from tide_ray.models import fused_layer
from tide_ray.models.packed_linear import PackedLinear

LINEAR_MODULES = (nn.Linear, Conv1D, PackedLinear)
LAYER_PARTS = ("decode_kernel", "gemm", "attention")
PARTS = (*LAYER_PARTS, "elementwise", "head", "sampler", "prologue", "scheduling", "requests")


def profile_engine(engine: TideEngine, run: Callable[[], Any]) -> dict[str, Any]:
    """``wall_seconds`` of ``run`` and the ``shares`` of it, which add up to 1 but for rounding.

    ``decode_kernel``: layers that are one kernel, attention included, as those of decode rows are; ``gemm``: linear
    modules in other layers; ``attention``: their K/V writes and attention; ``elementwise``: the rest of
    the layers (norms, rotary, activations, module calls; experts, if any); ``head``: final
    norm and LM head; ``sampler``; ``prologue``: embeddings and per-layer arguments; ``scheduling``: schedule, packing
    rows and commit; ``requests``: prompts to token ids; ``remainder``: what no part claims, such as answers to text.
    """
    with _timed(engine) as seconds:
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    seconds["elementwise"] = seconds.pop("layers") - sum(seconds[name] for name in LAYER_PARTS)
    parts = {name: seconds[name] for name in PARTS}
    parts["remainder"] = wall - sum(parts.values())
    return {
        "wall_seconds": round(wall, 3),
        "shares": {name: round(part / wall, 4) for name, part in parts.items()},
    }


@contextmanager
def _timed(engine: TideEngine) -> Iterator[dict[str, float]]:
    """Seconds spent in the engine's parts while the block runs; ``layers`` holds those of LAYER_PARTS.

    Without CUDA graphs, whose parts nobody can time.
    """
    adapter = engine.runner.adapter
    seconds: dict[str, float] = defaultdict(float)
    wrapped: list[tuple[Any, str, str]] = [
        (adapter, "run_layers", "layers"),
        (fused_layer, "decode_layers", "decode_kernel"),
        (adapter, "final_norm", "head"),
        (adapter, "head", "head"),
        (adapter, "prologue", "prologue"),
        (engine.runner.sampler, "choose", "sampler"),
        (LaunchCache, "update", "attention"),
        (LaunchCache, "attend", "attention"),
        (engine.scheduler, "schedule", "scheduling"),
        (runner, "build_rows", "scheduling"),
        (engine.committer, "commit", "scheduling"),
        (engine.requests, "add", "requests"),
    ]
    modules = itertools.chain.from_iterable(layer.modules() for layer in adapter.running_layers)
    linears = [module for module in modules if isinstance(module, LINEAR_MODULES)]
    wrapped += [(module, "forward", "gemm") for module in linears]
    originals = [(owner, name, getattr(owner, name), name in vars(owner)) for owner, name, _ in wrapped]
    synchronize = torch.cuda.synchronize if adapter.device.type == "cuda" else _nothing
    for (owner, name, part), (_, _, original, _) in zip(wrapped, originals, strict=True):
        setattr(owner, name, _timer(original, seconds, part, synchronize))
    graphs, engine.runner.graphs = engine.runner.graphs, None
    try:
        yield seconds
    finally:
        engine.runner.graphs = graphs
        for owner, name, original, was_own in originals:
            if was_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


def _timer(
    function: Callable[..., Any], seconds: dict[str, float], part: str, synchronize: Callable[[], None]
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize()
        seconds[part] += time.perf_counter() - start
        return result

    return timed


def _nothing() -> None:
    """A CPU has nothing to wait for."""
