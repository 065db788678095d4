"""A gate's scores and who exits, for many rows in one launch: normalise, project down, SiLU, project up, compare.

What TIDE's fused_layernorm_route does (arXiv 2603.21365), for any epsilon, RMS or layer norm with or without a weight,
and with a weight matrix that rows share instead of reading it once each. ``route`` chooses: the CUDA kernel on GPUs,
``route_reference`` elsewhere, which has the same signature and is the oracle of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tide_kernels import gpu
from tide_kernels.cuda.launches import ROUTE_MAX_BOTTLENECK

NORMS = ("none", "rms", "layer")


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What is done to a state before the gate reads it.

    ``kind``: ``none``, ``rms`` or ``layer``; ``weight`` and ``bias`` (``[D]``, the states' dtype) may be None. The
    result is rounded to the states' dtype, as the models' own norms are: once before a weight, once after.
    """

    kind: str = "none"
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """The same in torch."""
        if self.kind == "none":
            return states
        wide = states.float()
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(states.dtype)
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


@dataclass(frozen=True, slots=True)
class GateWeights:
    """A gate's network in float32, on one device.

    ``down``: ``[D, B]``, so that neighbouring units lie together; ``down_bias``: ``[B]``; ``up``: ``[B + F]``, the last
    F for features beside the state; ``calibration``: ``[3]``: the up-projection's bias, then scale and offset of the
    logit.
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    calibration: Tensor

    @property
    def bottleneck(self) -> int:
        """Hidden units, B."""
        return self.down.shape[1]

    @property
    def num_features(self) -> int:
        """Features beside the state, F."""
        return len(self.up) - self.bottleneck


def route(
    states: Tensor,
    gate: GateWeights,
    thresholds: Tensor | None,
    *,
    features: Tensor | None = None,
    norm: Normalisation = Normalisation(),
) -> tuple[Tensor, Tensor]:
    """Scores of N rows and whether each reaches its threshold.

    Args:
        states: float32, float16 or bfloat16 ``[N, D]``.
        thresholds: float32 ``[N]``; None where only scores are wanted, and nobody exits.
        features: float32 ``[N, F]``, or None where the gate has none.

    Returns:
        scores float32 ``[N]`` from 0 to 1 (NaN for a row with NaN) and exits bool ``[N]`` (False for it).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check(states, gate, thresholds, features, norm)
    if gpu.run_on(states, gate.down, unfit=unfit_bottleneck(gate.bottleneck)):
        from tide_kernels.cuda.route import route_cuda

        return route_cuda(states, gate, thresholds, features, norm)
    return route_reference(states, gate, thresholds, features=features, norm=norm)


def unfit_bottleneck(bottleneck: int) -> str | None:
    """Why the kernel does not take gates of a bottleneck; None where it does."""
    return gpu.over("a gate's bottleneck", bottleneck, ROUTE_MAX_BOTTLENECK)


def route_reference(
    states: Tensor,
    gate: GateWeights,
    thresholds: Tensor | None,
    *,
    features: Tensor | None = None,
    norm: Normalisation = Normalisation(),
) -> tuple[Tensor, Tensor]:
    """``route`` in torch."""
    hidden = F.silu(norm(states).float() @ gate.down + gate.down_bias)
    if features is not None:
        hidden = torch.cat((hidden, features), dim=-1)
    bias, scale, offset = gate.calibration
    scores = torch.sigmoid((hidden @ gate.up + bias) * scale + offset)
    return scores, torch.zeros_like(scores, dtype=torch.bool) if thresholds is None else scores >= thresholds


def _check(
    states: Tensor, gate: GateWeights, thresholds: Tensor | None, features: Tensor | None, norm: Normalisation
) -> None:
    num_rows, width = states.shape
    num_features = 0 if features is None else features.shape[1]
    num_thresholds = num_rows if thresholds is None else len(thresholds)
    if gate.down.shape[0] != width or gate.num_features != num_features or num_thresholds != num_rows:
        raise ValueError(
            f"states {tuple(states.shape)}, {num_features} features and {num_thresholds} thresholds do not fit a gate "
            f"of {gate.down.shape[0]} channels and {gate.num_features} features"
        )
    if norm.kind not in NORMS or (norm.kind == "none" and (norm.weight is not None or norm.bias is not None)):
        raise ValueError(f"a norm must be one of {', '.join(NORMS)}, got {norm.kind!r}, and none has no weight")
    vectors = [vector for vector in (norm.weight, norm.bias) if vector is not None]
    for vector in vectors:
        if vector.shape != (width,) or vector.dtype != states.dtype:
            raise ValueError(f"a norm's weight must be [{width}] in {states.dtype}, got {tuple(vector.shape)}")
    parts = (gate.down, gate.down_bias, gate.up, gate.calibration, thresholds, features)
    if any(part is not None and part.dtype != torch.float32 for part in parts):
        raise ValueError("gates, thresholds and features are float32")
    if any(part is not None and part.device != states.device for part in (*parts, *vectors)):
        raise ValueError(f"gates, thresholds, features and norms must lie on {states.device} like the states")
