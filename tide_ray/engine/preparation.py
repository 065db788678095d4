"""From a loaded model and a configuration to parts of an engine: the prepared model, K/V memory, graphs."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from tide_ray.config import EngineConfig
from tide_ray.engine.graphs import StageGraphs, capture_for
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.memory import MemoryPlan
from tide_ray.engine.runner import Runner
from tide_ray.engine.stages import Stage
from tide_ray.models.adapter import Adapter
from tide_ray.models.fused_norm import fuse_norms
from tide_ray.models.layer_fusion import fuse_layers, kernels_cover, use_decode_kernel
from tide_ray.models.loading import LoadedModel
from tide_ray.models.packed_linear import can_pack, pack_linears

logger = logging.getLogger(__name__)

UNLIMITED_POSITIONS = 2**20


def prepared(model: LoadedModel, config: EngineConfig) -> Adapter:
    """The adapter, with the model's layers laid out for this machine."""
    with torch.inference_mode():
        adapter = Adapter(model.model)
        fused = fuse_layers(adapter) if config.compile == "auto" else {}
        num_replaced = 0
        if can_pack(model.device, model.dtype):
            num_replaced += sum(pack_linears(module) for module in (model.model, *fused.values()))
        if config.compile == "auto" and (num_replaced or (model.device.type != "cpu" and kernels_cover(adapter))):
            num_replaced += fuse_norms(model.model)
        if num_replaced:
            adapter = Adapter(model.model)  # it holds on to modules outside of the layers
        use_decode_kernel(fused, config.page_size)
    adapter.fused_layers.update(fused)
    return adapter


def memory_and_graphs(
    config: EngineConfig, adapter: Adapter, stages: Sequence[Stage], plan: MemoryPlan
) -> tuple[KVCache, StageGraphs | None]:
    """The K/V pages of the plan and, where decoding is replayed from graphs, one more, for rows that are padding."""
    capture = capture_for(adapter) if config.cuda_graphs == "auto" else None
    pools = KVCache(
        adapter.kv_shapes,
        num_pages=plan.num_pages + (capture is not None),
        page_size=config.page_size,
        dtype=adapter.dtype,
        device=adapter.device,
    )
    if capture is None:
        return pools, None
    graphs = StageGraphs(
        adapter,
        stages,
        pools,
        capture,
        spare_page=plan.num_pages,
        max_rows=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
    )
    return pools, graphs


def runs_ahead(config: EngineConfig, runner: Runner) -> bool:
    """Whether a step is queued before the tokens of the last one are read, where the step allows it.

    With exits some do, see ``Runner.may_run_ahead``; where prompt tokens may stop or exits are drafts none does.
    """
    exits = runner.exits
    allows = exits is None or (not exits.verifies and not any(t is not None for t in exits.prefill_thresholds))
    if config.async_scheduling == "on" and not allows:
        logger.warning("async_scheduling: with prefill exits or drafts every step waits for the one before")
    is_wanted = config.async_scheduling == "on" or (
        config.async_scheduling == "auto" and runner.adapter.device.type != "cpu"
    )
    return is_wanted and allows


def position_limit(config: Any, windows: Collection[int] | None = None) -> int:
    """How many positions a model may see: its trained length; scaled rotary models keep to their unscaled length.

    Dynamic and long-context rotary scaling make a token's rotation depend on how long its sequence (or its batch)
    is; within the unscaled length they agree with the plain tables. A model that has its window in the mask alone
    (PhiMoE) keeps to it: packed rows have no mask, and within the window none is needed.

    Args:
        windows: what attention is asked for, see ``selfcheck``; None: not known.
    """
    limit = getattr(config, "max_position_embeddings", None) or UNLIMITED_POSITIONS
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(v, Mapping) for v in rope.values()) else [rope]
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, kind.get("original_max_position_embeddings") or limit)
    if windows and not any(windows):
        limit = min(limit, _window(config) or limit)
    return int(limit)


def _window(config: Any) -> int | None:
    """The sliding window of a configuration, None or 0 where it says that no layer has one."""
    kinds = getattr(config, "layer_types", None)
    is_on = getattr(config, "use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    return getattr(config, "sliding_window", None) if is_on else None
