"""How a model rotates K, found by asking it: no per-architecture code.

Each layer is given one state at two positions; the K it stores at position 0 is unrotated, so the rotation that turns
it into the other K shows which layout the model uses (Su et al., arXiv 2104.09864, in the two layouts in use).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tide_kernels.kv_write import Rotation
from tide_ray.models.adapter import Adapter
from tide_ray.models.layer_calls import LayerCall
from tide_ray.models.row_cache import KeyValueTap

PROBE_POSITION = 11
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True, slots=True)
class Rotary:
    """``layout``: ``none``, ``half`` (pairs i, i + r/2) or ``interleaved`` (pairs 2i, 2i + 1; ``repeats``: the tables'
    first half holds one entry per pair)."""

    layout: str
    repeats: bool = False

    def rotation(self, cos: Tensor, sin: Tensor) -> Rotation | None:
        """What turns K to the positions of the tables ``[N, r]``; None where nothing does."""
        return None if self.layout == "none" else Rotation(cos, sin, self.layout, self.repeats)

    def rotate(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``[N, ..., d]`` to the positions of the tables ``[N, r]``; channels past r stay."""
        rotation = self.rotation(cos, sin)
        return key if rotation is None else rotation(key)

    def unrotate(self, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The inverse of ``rotate``, also where the tables are scaled (YaRN)."""
        scale = cos.square() + sin.square()
        return self.rotate(key, cos / scale, -sin / scale)


NONE = Rotary("none")
CANDIDATES = (NONE, Rotary("half"), Rotary("interleaved"), Rotary("interleaved", repeats=True))


def rotary_tables(call: LayerCall) -> tuple[Tensor, Tensor] | None:
    """The (cos, sin) tables ``[N, r]`` that the model passes to a layer, None when it passes none."""
    for value in (call.kwargs.get("position_embeddings"), *call.args):
        if isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) and v.ndim == 3 for v in value):
            return value[0][0], value[1][0]
    return None


@torch.inference_mode()
def find_rotary(adapter: Adapter) -> list[Rotary] | None:
    """How each layer rotates K, or None when one does so in a way that is not known here."""
    device = adapter.device
    tap = KeyValueTap()
    ids = torch.ones(2, dtype=torch.long, device=device)
    positions = torch.tensor([0, PROBE_POSITION], device=device)
    _, calls = adapter.prologue(ids, positions, tap)
    generator = torch.Generator().manual_seed(0)
    kinds = []
    for layer in range(adapter.num_layers):
        state = torch.randn(adapter.config.hidden_size, generator=generator).to(device, adapter.dtype)
        key, _ = adapter.keys_values(layer, state.expand(1, 2, -1), calls[layer], tap)
        kind = _matching(key, rotary_tables(calls[layer]), TOLERANCE[adapter.dtype])
        if kind is None:
            return None
        kinds.append(kind)
    return kinds


def _matching(key: Tensor, tables: tuple[Tensor, Tensor] | None, tolerance: float) -> Rotary | None:
    """The candidate that turns the K of position 0 into the K of the other position, ``key`` being ``[2, H, d]``."""
    at_zero, moved = key[:1].float(), key[1:].float()

    def fits(guess: Tensor) -> bool:
        return bool((guess - moved).norm() <= tolerance * moved.norm())

    if fits(at_zero):
        return NONE
    if tables is None or tables[0].shape[-1] > key.shape[-1]:
        return None
    cos, sin = (table.float() for table in tables)
    for kind in CANDIDATES[1:]:
        start = kind.unrotate(at_zero, cos[:1], sin[:1])
        if fits(kind.rotate(start, cos[1:], sin[1:])):
            return kind
    return None
