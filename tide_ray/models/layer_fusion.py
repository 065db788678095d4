"""Which layers of a model run fused, on a CPU or by a GPU's kernels: LLaMA's, by their parts and by a probe.

A layer is taken over when its parts have LLaMA's names (two norms, the four attention projections with or without norms
of Q and K, the gated feed-forward part) and the fused layer computes what the layer computes for random rows: Q, K and
V as attention sees them, and the output. How it calls attention is noted meanwhile. Anything else keeps its own code.
The engine's self-check compares with the model's own layers once more, on embedded tokens.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tide_kernels import gpu
from tide_kernels.decoder_layer import LayerWeights, Places, decode_layers
from tide_kernels.vectors import MAX_LANES
from tide_ray.models.adapter import Adapter
from tide_ray.models.fused_layer import AttentionCall, FusedLayer, LinearPart, NotLlamas
from tide_ray.models.layer_calls import LayerCall
from tide_ray.models.row_cache import RowCache, attention_scale

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}
PROBE_POSITIONS = (0, 3, 7, 2, 9, 11, 1, 5)
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor", "partial_rotary_factor",
    "original_max_position_embeddings",
}  # fmt: skip
"""Settings that reach a layer in its rotary tables alone; others may act on positions that no probe sees."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative error of what a layer adds to its input that rounding can reach."""


logger = logging.getLogger(__name__)


class _ProbeCache(RowCache):
    """A row cache that notes what attention is given, and lets every row attend to all."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: tuple[Tensor, ...] = ()
        self.call: AttentionCall | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen = key_states.clone(), value_states.clone()
        return key_states, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, window: int
    ) -> Tensor:
        self.seen = query.clone(), *self.seen
        self.call = AttentionCall(attention_scale(query, scale), softcap, window)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


@torch.inference_mode()
def fuse_layers(adapter: Adapter) -> dict[int, FusedLayer]:
    """Take over the layers of a model that are LLaMA's; the others are not in what is returned.

    A layer whose kernels cannot be compiled keeps its own code too, with a warning.
    """
    if not kernels_cover(adapter):
        return {}
    ids = torch.arange(1, 1 + len(PROBE_POSITIONS), device=adapter.device) % adapter.config.vocab_size
    cache = _ProbeCache()
    _, calls = adapter.prologue(ids, torch.tensor(PROBE_POSITIONS, device=adapter.device), cache)
    fused = {}
    for index, layer in enumerate(adapter.layers):
        try:
            fused[index] = _known(layer) or _proven(adapter, index, calls[index], cache)
        except (NotLlamas, ValueError) as reason:  # kernels refuse shapes that are not LLaMA's
            logger.debug("layer %d keeps its own code: %s", index, reason)
        except Exception as error:  # a compiler's, of which there is no list
            logger.warning("layers keep their own code, as kernels failed: %s", str(error).split("\n")[0])
            break
    return fused


def kernels_cover(adapter: Adapter) -> bool:
    """Whether kernels run what is in layers besides products: float32 and bfloat16 on a CPU, and on a GPU whose kernels
    work the 16-bit types; float32 there keeps the model's own roundings."""
    if adapter.device.type == "cpu":
        return adapter.dtype in (torch.float32, torch.bfloat16)
    return adapter.dtype != torch.float32 and gpu.run_on(next(adapter.model.parameters()))


@torch.inference_mode()
def use_decode_kernel(fused: dict[int, FusedLayer], page_size: int) -> None:
    """Let layers whose weights are packed run few rows in one kernel, where that gives what their own calls give."""
    weights = {index: layer.tiled_weights() for index, layer in fused.items()}
    try:
        for index, tiled in weights.items():
            if tiled is not None:
                _compare_decoding(fused[index], tiled, page_size)
    except Exception as error:  # a compiler's, of which there is no list
        logger.warning("layers do without the kernel for decode rows: %s", str(error).split("\n")[0])
        weights = dict.fromkeys(weights)
    for index, tiled in weights.items():
        fused[index].decode_weights = tiled


def _compare_decoding(layer: FusedLayer, weights: LayerWeights, page_size: int) -> None:
    generator = torch.Generator().manual_seed(layer.layer_idx)
    num_rows, dtype = 3, weights.first_norm.dtype
    hidden = torch.randn(1, num_rows, len(weights.first_norm), generator=generator).to(dtype)
    angles = torch.randn(num_rows, layer.head_dim, generator=generator)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pages = torch.zeros(2, num_rows, weights.num_kv_heads, page_size, layer.head_dim, dtype=dtype)
    alone = torch.arange(num_rows)
    table, lengths = alone.int()[:, None], torch.ones(num_rows, dtype=torch.int32)
    places = Places([(pages[0], pages[1])], alone, torch.zeros_like(alone), table, lengths)
    actual = decode_layers(hidden, cos, sin, places, [weights])
    _, key, value = layer.heads(hidden, cos, sin)
    group = weights.num_heads // weights.num_kv_heads
    expected = layer.finish(hidden, value.repeat_interleave(group, 1).flatten(1)[None])  # of itself a row sees itself
    for mine, theirs in ((actual - hidden, expected - hidden), (pages[0, :, :, 0], key), (pages[1, :, :, 0], value)):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30)
        if not error <= TOLERANCE[dtype]:
            raise ValueError(f"layer {layer.layer_idx} differs (relative error {error:.2g})")


def _known(layer: nn.Module) -> FusedLayer | None:
    """The fused layer that has taken this one over already."""
    part = getattr(getattr(layer, "self_attn", None), "q_proj", None)
    return part.owner if isinstance(part, LinearPart) else None


def _proven(adapter: Adapter, index: int, call: LayerCall, cache: _ProbeCache) -> FusedLayer:
    layer, dtype = adapter.layers[index], adapter.dtype
    _check_parts(layer, adapter.config)
    tables = call.kwargs.get("position_embeddings")
    head_dim = adapter.kv_shapes[index].head_dim
    shape = (1, len(PROBE_POSITIONS), head_dim)
    if not isinstance(tables, tuple) or any(table.shape != shape or table.dtype != dtype for table in tables):
        raise NotLlamas("it is given no rotary tables of the head's width")
    generator = torch.Generator().manual_seed(index)
    size = (1, len(PROBE_POSITIONS), adapter.config.hidden_size)
    scales = torch.logspace(-1, 2, len(PROBE_POSITIONS))[:, None]
    rows = (torch.randn(size, generator=generator) * scales).to(adapter.device, dtype)
    cache.call, cache.seen = None, ()
    with_own_code = adapter.run_layer(index, rows, call, cache)
    assert cache.call is not None, "the layer did not attend"
    expected = (*cache.seen, with_own_code - rows)
    fused = FusedLayer(layer, cache.call, head_dim)
    with_fused = fused(rows, call, cache)
    for mine, theirs in zip((*cache.seen, with_fused - rows), expected, strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30)
        if mine.shape != theirs.shape or not error <= TOLERANCE[dtype]:
            raise NotLlamas(f"a probe of {type(layer).__name__} differs (relative error {error:.2g})")
    fused.take_over(layer)
    return fused


def _check_parts(layer: nn.Module, config: Any) -> None:
    parts = {name: set(dict(module.named_children())) for name, module in layer.named_modules()}
    if parts[""] != LAYER_PARTS or getattr(config, "clip_qkv", None) is not None:
        raise NotLlamas(f"{type(layer).__name__} has the parts {sorted(parts[''])}")
    attention, mlp = parts["self_attn"], parts["mlp"]
    if not ATTENTION_PARTS <= attention <= ATTENTION_PARTS | HEAD_NORMS or len(attention & HEAD_NORMS) == 1:
        raise NotLlamas(f"its attention has the parts {sorted(attention)}")
    if not MLP_PARTS <= mlp <= MLP_PARTS | {"act_fn"}:
        raise NotLlamas(f"its feed-forward part has the parts {sorted(mlp)}")
    unknown = set(getattr(config, "rope_parameters", None) or {}) - ROPE_KEYS
    if unknown:
        raise NotLlamas(f"its positions act in ways that are not known: {', '.join(sorted(map(str, unknown)))}")
    for name, module in layer.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            raise NotLlamas(f"{name} is a {type(module).__name__}")
        width = getattr(module, "weight", torch.empty(MAX_LANES)).shape[-1]
        if width % MAX_LANES:
            raise NotLlamas(f"{name} has rows of {width} numbers, not of {MAX_LANES} x n")
