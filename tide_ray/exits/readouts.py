"""Linear maps from the state at a boundary: exit heads and KV heads, and the one input that all of them take.

An exit head gives the final pre-norm state (a tuned-lens translator, arXiv 2303.08112); the model's own final norm and
LM head follow. KV heads give the pre-rotary K and the V of every deeper layer in one product, for tokens that stop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tide_kernels import gpu
from tide_kernels.route import unfit_bottleneck
from tide_ray.exits.gates import Gate
from tide_ray.models.adapter import KVShape
from tide_ray.models.packed_linear import PackedLinear, can_pack, pack_linears

STATE_EPS = 1e-6


def unit_rms(states: Tensor) -> Tensor:
    """States ``[..., D]`` scaled to a root mean square of 1, computed in float32, in the dtype of ``states``.

    The input of exit heads, KV heads and gates, in calibration and in serving alike, and the scale of exit heads'
    targets: every final norm takes scale out again.
    """
    wide = states.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + STATE_EPS)).to(states.dtype)


class ExitHead(nn.Module):
    """Boundary state -> final pre-norm state up to scale: affine, or of low rank with ``rank``."""

    def __init__(self, hidden_size: int, rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(hidden_size, rank, bias=False) if rank else nn.Identity()
        self.up = nn.Linear(rank or hidden_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        """Unit-rms states ``[..., D]`` -> ``[..., D]``."""
        projected: Tensor = self.up(self.down(states))
        return projected


class KVHead(nn.Module):
    """Boundary state -> K (before rotary) and V of the layers from the boundary on.

    Columns: for each layer its K then its V, heads in order.

    Args:
        hidden_size: width D of the state.
        shapes: K/V shape of each of those layers, the shallowest first.
    """

    def __init__(self, hidden_size: int, shapes: Sequence[KVShape]) -> None:
        super().__init__()
        self.project = nn.Linear(hidden_size, kv_width(shapes))

    def forward(self, states: Tensor) -> Tensor:
        """Unit-rms states ``[N, D]`` -> ``[N, kv_width]``."""
        projected: Tensor = self.project(states)
        return projected


def kv_width(shapes: Sequence[KVShape]) -> int:
    """Columns that K and V of the layers take together."""
    return sum(2 * shape.num_heads * shape.head_dim for shape in shapes)


def gate_for_inference(gate: Gate, device: torch.device, dtype: torch.dtype) -> Gate:
    """The gate on the model's device: its network in float32, its shortlist in the model's dtype."""
    gate = gate.to(device).eval().requires_grad_(False)
    if gate.shortlist is not None:
        gate.shortlist = gate.shortlist.to(dtype)
        if can_pack(device, dtype) and type(gate.shortlist) is nn.Linear:
            gate.shortlist = PackedLinear(gate.shortlist)
    if gpu.run_on(gate.down.weight, unfit=unfit_bottleneck(gate.down.out_features)):
        gate.use_kernel()
    return gate


def for_inference(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module in the model's dtype on its device, with linear layers packed where that pays."""
    module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if can_pack(device, dtype):
        pack_linears(module)
    return module
