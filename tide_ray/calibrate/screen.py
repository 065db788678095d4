"""A first look at the candidate depths, through ridge heads and before anything costly: the rest is for the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.gate_training import threshold_at
from tide_ray.calibrate.reservoir import Reservoir
from tide_ray.exits.readouts import ExitHead

MAX_KEPT = 3
ERROR = 0.02


def most_promising(
    heads: Mapping[int, ExitHead], held: Reservoir, readout: Callable[[Tensor], Tensor], num_layers: int
) -> tuple[list[int], dict[int, float]]:
    """The depths that save most together, rising; and what each depth would save alone, as a share of layer runs.

    A token saves the layers behind the first depth of the set where its choice is sure: as confident as only ERROR
    wrong ones are among. Depths are added one by one, each the best beside those before it.

    Args:
        heads: by depth, as fitted, all on the readout's device.
        held: rows that the heads have not seen, with ``state_D`` for every depth D and ``final``.
        readout: pre-norm states ``[N, D]`` to logits.
    """
    savings = _savings_of_tokens(heads, held, readout, num_layers)
    kept: list[int] = []
    saved = np.zeros(held.num_rows)
    while len(kept) < min(MAX_KEPT, len(savings)):
        others = [depth for depth in savings if depth not in kept]
        best = max(others, key=lambda depth: (float(np.maximum(saved, savings[depth]).mean()), depth))
        saved = np.maximum(saved, savings[best])
        kept.append(best)
    return sorted(kept), {depth: float(each.mean()) for depth, each in savings.items()}


def _savings_of_tokens(
    heads: Mapping[int, ExitHead], held: Reservoir, readout: Callable[[Tensor], Tensor], num_layers: int
) -> dict[int, np.ndarray]:
    """Share of the layers that each held-out token would save at each depth: 0 where its choice is not sure."""
    savings = {}
    device = next(iter(heads.values())).up.weight.device
    final = held.take("final").to(device)
    with torch.inference_mode():
        expected = readout(final).argmax(-1)
        for depth, head in heads.items():
            states = held.take(f"state_{depth}").to(device).float()
            top = readout(head(states).to(final.dtype)).softmax(-1).max(-1)
            right, confidence = (top.indices == expected).cpu().numpy(), top.values.cpu().numpy()
            is_sure = confidence >= threshold_at(confidence, right, ERROR)
            savings[depth] = is_sure * (1 - depth / num_layers)
    return savings
