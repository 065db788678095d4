"""Reads a ``router.pt`` of TIDE (arXiv 2603.21365, v0.2) as a router checkpoint, to run that algorithm as ``posthoc``.

Its routers score the final norm of a layer's state, and the logits of an exit are the LM head of that: so exit heads
are identities here, and the final norm's weight becomes part of the router.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tide_ray.exits.checkpoint import Boundary, Routers, as_facts, fingerprint_of
from tide_ray.exits.gates import Gate
from tide_ray.exits.readouts import ExitHead
from tide_ray.models.adapter import Adapter
from tide_ray.models.loading import LoadedModel
from tide_ray.types import UserError

MAX_BYTES = 1 << 30
LABEL = "TIDE: cosine with the final state above 0.98"


def import_tide(path: str, model: LoadedModel) -> Routers:
    """The routers as boundaries without calibrated thresholds; the one after the last layer skips nothing and is left
    out.

    Raises:
        UserError: not such a file, or not made for a model of this shape.
    """
    width, bottleneck, layers = _read(path)
    with torch.inference_mode():
        adapter = Adapter(model.model)
        weight = _norm_weight(adapter)
    if width != len(weight):
        raise UserError(f"router: hidden_dim must be {len(weight)} for this model, got {width} in {path!r}")
    boundaries = [
        Boundary(layer + 1, _identity(width), _gate(state, weight, bottleneck, path))
        for layer, state in sorted(layers.items())
        if 0 <= layer < adapter.num_layers - 1
    ]
    if not boundaries:
        raise UserError(f"router: no router lies before this model's last layer, got layers {sorted(layers)}")
    fingerprint = fingerprint_of(model, kv_policy="copy", num_layers=adapter.num_layers, hidden_size=width)
    return Routers(
        boundaries, as_facts(fingerprint, label=LABEL, shapes=adapter.kv_shapes, training={"source": "TIDE router.pt"})
    )


def _read(path: str) -> tuple[int, int, dict[int, dict[str, Tensor]]]:
    file = Path(path)
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        raise UserError(f"router must be a file of at most {MAX_BYTES >> 20} MiB, got {path!r}")
    try:
        raw: Any = torch.load(file, map_location="cpu", weights_only=True)
        layers = {int(layer): state for layer, state in raw["router_layers"].items()}
        return int(raw["hidden_dim"]), int(raw["bottleneck_dim"]), layers
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"router must be a router.pt of TIDE, got {path!r} ({type(error).__name__})") from None


def _norm_weight(adapter: Adapter) -> Tensor:
    """The final norm's weight, found by asking it; for norms that only scale a unit-rms state.

    Raises:
        UserError: the norm does more (it centres, or adds).
    """
    width = adapter.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(1, 1, width, dtype=adapter.dtype, device=adapter.device)
    weight: Tensor = adapter.final_norm(ones)[0, 0].float().cpu()
    probe = torch.randn(1, 1, width, generator=generator)
    probe = probe / probe.square().mean().sqrt()
    normed = adapter.final_norm(probe.to(adapter.device, adapter.dtype))[0, 0].float().cpu()
    if not torch.allclose(normed, probe[0, 0] * weight, atol=0.05 * float(weight.abs().mean()), rtol=0.05):
        raise UserError("router: only models whose final norm is an RMSNorm can take TIDE's routers")
    return weight


def _identity(width: int) -> ExitHead:
    head = ExitHead(width)
    with torch.no_grad():
        head.up.weight.copy_(torch.eye(width))
        head.up.bias.zero_()
    return head


def _gate(state: dict[str, Tensor], weight: Tensor, bottleneck: int, path: str) -> Gate:
    gate = Gate(len(weight), bottleneck)
    try:
        with torch.no_grad():
            gate.down.weight.copy_(state["down.weight"].float() * weight)
            gate.up.weight.copy_(state["up.weight"].float())
            gate.down.bias.zero_()
            gate.up.bias.zero_()
    except (KeyError, RuntimeError, AttributeError, TypeError):
        raise UserError(f"router: router_layers must hold down.weight and up.weight, others in {path!r}") from None
    return gate
