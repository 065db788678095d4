"""A first look at the candidate depths, through ridge heads and before anything costly: the rest is for the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tide_ray.calibrate.gate_training import threshold_at
from tide_ray.calibrate.reservoir import Reservoir
from tide_ray.exits.readouts import ExitHead

MAX_KEPT = 3
ERROR = 0.02


def screened(
    heads: Mapping[int, ExitHead], held: Reservoir, readout: Callable[[Tensor], Tensor], num_layers: int
) -> dict[int, float]:
    """Each depth's share of layer runs saved if its most confident tokens left there, at ERROR wrong ones among them.

    Args:
        heads: by depth, as fitted.
        held: rows that the heads have not seen, with ``state_D`` for every depth D and ``final``.
        readout: pre-norm states ``[N, D]`` to logits.
    """
    savings = {}
    final = held.take("final")
    with torch.inference_mode():
        expected = readout(final).argmax(-1)
        for depth, head in heads.items():
            top = readout(head(held.take(f"state_{depth}").float()).to(final.dtype)).softmax(-1).max(-1)
            right, confidence = (top.indices == expected).cpu().numpy(), top.values.cpu().numpy()
            share = float((confidence >= threshold_at(confidence, right, ERROR)).mean())
            savings[depth] = share * (1 - depth / num_layers)
    return savings


def most_promising(savings: Mapping[int, float]) -> list[int]:
    """The MAX_KEPT depths with the largest saving, rising; of equal ones the deeper."""
    best = sorted(savings, key=lambda depth: (savings[depth], depth))[-MAX_KEPT:]
    return sorted(best)
