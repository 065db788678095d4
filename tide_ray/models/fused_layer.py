"""Whole decoder layers in a few calls, for models whose layers are LLaMA's: on a CPU, calls are much of a step's time.

Q, K and V come from one product, gate and up from another; the layer's own modules stay usable and read the same
weights. ``layer_fusion`` decides which layers are LLaMA's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tide_kernels.decoder_layer import LayerWeights, decode_layers
from tide_kernels.rms_norm import add_rms_norm, rms_norm
from tide_kernels.rotary import rotate
from tide_kernels.silu_mul import silu_mul
from tide_kernels.tiled_linear import TiledWeights
from tide_ray.models.fused_norm import norm_epsilon
from tide_ray.models.layer_calls import LayerCall
from tide_ray.models.packed_linear import DECODE_ROWS, PackedLinear
from tide_ray.models.row_cache import RowCache


class NotLlamas(Exception):
    """The layer is not one that ``FusedLayer`` can stand for."""


@dataclass(frozen=True, slots=True)
class Norm:
    """Weight ``[D]`` and epsilon of an RMS norm."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        eps = norm_epsilon(module)
        if eps is None:
            raise NotLlamas(f"{type(module).__name__} has no epsilon")
        assert isinstance(module.weight, Tensor)
        return cls(module.weight.detach(), eps)

    def __call__(self, rows: Tensor) -> Tensor:
        return rms_norm(rows, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks of attention besides Q, K and V."""

    scale: float
    softcap: float
    window: int


class LinearPart(nn.Module):
    """Some outputs of a fused layer's product, in the place of the linear layer that they came from."""

    def __init__(self, owner: FusedLayer, name: str, outputs: slice) -> None:
        super().__init__()
        self._owner = (owner,)  # not as a submodule: the owner's modules are not the model's
        self._name = name
        self._outputs = outputs

    @property
    def owner(self) -> FusedLayer:
        return self._owner[0]

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = getattr(self.owner, self._name)(rows)
        return outputs[..., self._outputs]


class FusedLayer(nn.Module):
    """One decoder layer over packed rows.

    Args:
        layer: the model's own.
        attention: how it calls attention.
        head_dim: width of a head.
    """

    def __init__(self, layer: nn.Module, attention: AttentionCall, head_dim: int) -> None:
        super().__init__()
        source: Any = layer
        attn, mlp = source.self_attn, source.mlp
        self.qkv = joined(attn.q_proj, attn.k_proj, attn.v_proj)
        self.out = joined(attn.o_proj)
        self.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        self.down = joined(mlp.down_proj)
        self.first_norm, self.second_norm = Norm.of(source.input_layernorm), Norm.of(source.post_attention_layernorm)
        self.head_norms = (Norm.of(attn.q_norm), Norm.of(attn.k_norm)) if hasattr(attn, "q_norm") else None
        self.attention = attention
        self.decode_weights: LayerWeights | None = None  # for up to DECODE_ROWS rows, see ``tiled_weights``
        self.layer_idx = int(attn.layer_idx)
        self.head_dim = head_dim
        self.num_heads = attn.q_proj.out_features // head_dim
        self.num_turned = (attn.q_proj.out_features + attn.k_proj.out_features) // head_dim

    def forward(self, hidden: Tensor, call: LayerCall, cache: RowCache) -> Tensor:
        """Packed rows ``[1, N, D]`` -> ``[1, N, D]``, with K/V stored in ``cache``."""
        decoded = run_in_one_call([self], hidden, call, cache)
        if decoded is not None:
            return decoded
        cos, sin = call.kwargs["position_embeddings"]
        query, key, value = self.heads(hidden, cos[0], sin[0])
        return self.finish(hidden, self._attended(query, key, value, cache))

    def heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V ``[N, H, d]`` as attention sees them."""
        joint = self.qkv(self.first_norm(hidden))[0].unflatten(-1, (-1, self.head_dim))
        query, key, value = self._split(joint)
        if self.head_norms is None:
            rotate(joint[:, : self.num_turned], cos, sin)
        else:
            query, key = self.head_norms[0](query), self.head_norms[1](key)
            rotate(query, cos, sin)
            rotate(key, cos, sin)
        return query, key, value

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output for its input and what attention made of it, ``[1, N, H d]``."""
        second = self.second_norm
        hidden, normed = add_rms_norm(hidden, self.out(attended), second.weight, second.eps)
        return hidden + self.down(silu_mul(self.gate_up(normed)))

    def _split(self, joint: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V ``[N, H, d]`` of ``[N, H + 2 H_kv, d]``."""
        turned, value = joint[:, : self.num_turned], joint[:, self.num_turned :]
        return turned[:, : self.num_heads], turned[:, self.num_heads :], value

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, cache: RowCache) -> Tensor:
        """Store K and V ``[N, H_kv, d]`` and attend: ``[N, H, d]`` -> ``[1, N, H d]``."""
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        cache.update(key, value, self.layer_idx)
        ask = self.attention
        return cache.attend(query, key, value, scale=ask.scale, softcap=ask.softcap, window=ask.window).flatten(2)

    def tiled_weights(self) -> LayerWeights | None:
        """What the kernel for decode rows reads, once weights are packed; None where some do not lie as it needs."""
        products: list[TiledWeights] = []
        for linear in (self.qkv, self.out, self.gate_up, self.down):
            if not isinstance(linear, PackedLinear) or linear.tiled is None:
                return None
            products.append(linear.tiled)
        qkv, out, gate_up, down = products
        if not gate_up.can_gate:
            return None
        query_norm, key_norm = self.head_norms or (None, None)
        ask = self.attention
        return LayerWeights(
            first_norm=self.first_norm.weight,
            second_norm=self.second_norm.weight,
            query_norm=None if query_norm is None else query_norm.weight,
            key_norm=None if key_norm is None else key_norm.weight,
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            eps=(
                self.first_norm.eps,
                self.second_norm.eps,
                0.0 if query_norm is None else query_norm.eps,
                0.0 if key_norm is None else key_norm.eps,
            ),
            num_heads=self.num_heads,
            num_kv_heads=self.num_turned - self.num_heads,
            head_dim=self.head_dim,
            scale=ask.scale,
            softcap=ask.softcap,
            window=ask.window,
        )

    def take_over(self, layer: nn.Module) -> None:
        """Let the layer's own linear modules read this layer's weights, so that theirs are freed."""
        source: Any = layer
        for parent, names, name in (
            (source.self_attn, ("q_proj", "k_proj", "v_proj"), "qkv"),
            (source.self_attn, ("o_proj",), "out"),
            (source.mlp, ("gate_proj", "up_proj"), "gate_up"),
            (source.mlp, ("down_proj",), "down"),
        ):
            start = 0
            for part in names:
                stop = start + getattr(parent, part).out_features
                setattr(parent, part, LinearPart(self, name, slice(start, stop)))
                start = stop


def run_in_one_call(layers: Sequence[FusedLayer], hidden: Tensor, call: LayerCall, cache: RowCache) -> Tensor | None:
    """Layers one after another on packed rows ``[1, N, D]``, all called alike; None where no kernel takes them so."""
    weights = [layer.decode_weights for layer in layers if layer.decode_weights is not None]
    if len(weights) < len(layers) or hidden.shape[1] > DECODE_ROWS:
        return None
    places = cache.decode_places([layer.layer_idx for layer in layers])
    if places is None:
        return None
    cos, sin = call.kwargs["position_embeddings"]
    return decode_layers(hidden, cos[0], sin[0], places, weights)


def joined(*linears: nn.Linear) -> nn.Linear:
    """One linear layer that computes the outputs of all, one after another. A single one is itself."""
    if len(linears) == 1:
        return linears[0]
    first = linears[0]
    has_bias = [linear.bias is not None for linear in linears]
    if any(has_bias) != all(has_bias):
        raise NotLlamas("some of its joint projections have a bias")
    num_outputs = sum(linear.out_features for linear in linears)
    joint = nn.Linear(first.in_features, num_outputs, bias=all(has_bias), device="meta")
    joint.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if all(has_bias):
        joint.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joint
