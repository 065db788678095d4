"""Other rules at the cost of a setting: fixed layers for every row, and other ways to say which tokens stop.

Cost is the share of layer runs over all rows, prompts included. Fixed layers are given that share. The others keep the
setting's prompt exits and let as much of the answers go as the setting does: their thresholds are found on full depth's
rows of the same prompts, which hindsight a job does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.replay import Replay, ReplayRows
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.policies import Scorer
from tide_ray.models.adapter import Adapter

CHUNK = 256
LEAST_CAPACITY = 0.01
MIN_EXIT_SHARE = 0.005
"""Of an answer's tokens: where fewer stop there is nothing to compare rules for stopping on."""


class Scores:
    """Gate scores and confidences of answer rows at full depth, ``[rows]`` for each boundary."""

    def __init__(self, adapter: Adapter, boundaries: Sequence[Boundary], examples: Sequence[Example]) -> None:
        self._scorer = Scorer(boundaries, adapter.final_norm, adapter.head)
        self._gates: list[list[np.ndarray]] = [[] for _ in boundaries]
        self._confidences: list[list[np.ndarray]] = [[] for _ in boundaries]
        longest = max(len(example.token_ids) for example in examples)
        Replay(adapter, boundaries, None, kv_policy="copy", longest=longest).run(examples, self._note)
        self.gates = [np.concatenate(parts) for parts in self._gates]
        self.confidences = [np.concatenate(parts) for parts in self._confidences]

    def _note(self, boundary: int, states: Tensor, rows: ReplayRows) -> np.ndarray:
        """Stops nothing."""
        for index in torch.from_numpy(np.flatnonzero(rows.is_generated)).split(CHUNK):
            asked = states[index.to(states.device)]
            self._gates[boundary].append(self._scorer.by_gate(boundary, asked).cpu().numpy())
            self._confidences[boundary].append(self._scorer.by_confidence(boundary, asked).cpu().numpy())
        return np.zeros(len(states), dtype=bool)


def fixed_layers(cost: float, num_layers: int) -> dict[str, dict[str, Any]]:
    """Engine settings of rules that run the same layers for every row, by name."""
    depth = min(max(1, round(cost * num_layers)), num_layers - 1)
    return {
        "every token stops at one depth": {"policy": "static", "exit_layer": depth},
        "layers skipped evenly": {"policy": "static", "static_cost": cost},
    }


def stopping_rules(
    scores: Scores, depths: Sequence[int], num_layers: int, mean_depth: float, prompt_exits: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Engine settings of rules that let answer tokens go, by name, at a mean depth of the rows that are asked.

    Args:
        prompt_exits: settings of prompt exits to keep.
    """
    confidence = threshold_for(scores.confidences, depths, num_layers, mean_depth)
    gate = threshold_for(scores.gates, depths, num_layers, mean_depth)
    return {
        "confidence": {"policy": "confidence", "exit_threshold": confidence, **prompt_exits},
        "capacity": {"policy": "capacity", "capacity": capacity_for(depths, num_layers, mean_depth), **prompt_exits},
        "post hoc, all layers run": {"policy": "posthoc", "exit_threshold": gate},
    }


def threshold_for(scores: Sequence[np.ndarray], depths: Sequence[int], num_layers: int, mean_depth: float) -> float:
    """The score, the same at all boundaries, from which rows must stop to leave at ``mean_depth`` on average."""
    candidates = np.unique(np.concatenate(scores))
    low, high = 0, len(candidates) - 1
    while low < high:  # a higher threshold lets nobody go earlier
        middle = (low + high) // 2
        is_deep = _mean_depth(scores, depths, num_layers, candidates[middle]) >= mean_depth
        low, high = (low, middle) if is_deep else (middle + 1, high)
    near = candidates[max(low - 1, 0) : low + 1]
    best = min(near, key=lambda score: abs(_mean_depth(scores, depths, num_layers, score) - mean_depth))
    return float(np.clip(best, 0.0, 1.0))


def capacity_for(depths: Sequence[int], num_layers: int, mean_depth: float) -> float:
    """The share of rows that goes deeper at each boundary for rows to leave at ``mean_depth`` on average."""
    low, high = LEAST_CAPACITY, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        goes_on, mean = 1.0, 0.0
        for depth in depths:
            mean += goes_on * (1 - middle) * depth
            goes_on *= middle
        low, high = (middle, high) if mean + goes_on * num_layers < mean_depth else (low, middle)
    return (low + high) / 2


def _mean_depth(scores: Sequence[np.ndarray], depths: Sequence[int], num_layers: int, threshold: float) -> float:
    left = np.full(len(scores[0]), num_layers)
    for score, depth in zip(reversed(scores), reversed(depths), strict=True):
        left = np.where(score >= threshold, depth, left)
    return float(left.mean())


def prefill_share_of(boundary: Boundary, threshold: float | None) -> float | None:
    """The share of prompt tokens that ``threshold`` stands for in the last ``boundary``; None: it stops none."""
    if threshold is None or not boundary.prefill_quantiles:
        return None
    place = int(np.searchsorted(boundary.prefill_quantiles, threshold, side="right")) - 1
    return place / (len(boundary.prefill_quantiles) - 1) if place > 0 else None
