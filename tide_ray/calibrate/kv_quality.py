"""How much each K/V policy costs: the same tokens exit, and only the K/V that they leave in deeper layers differ."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from tide_ray.calibrate.choice import gate_stops
from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.intervals import interval
from tide_ray.calibrate.replay import Replay, nothing_stops
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.policies import Scorer
from tide_ray.exits.rotary import Rotary
from tide_ray.models.adapter import Adapter

EXIT_SHARE = 0.3
"""Of the tokens that are asked at a boundary the surest, at all boundaries and for all models alike, so that reports
can be compared: thresholds calibrated for an error may let none go."""
MAX_EXAMPLES = 16


def kv_quality(
    adapter: Adapter, kinds: Sequence[Rotary] | None, boundaries: Sequence[Boundary], examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """Of each K/V policy that the model allows: ``exit_share`` of the judged tokens, and with intervals by prompt the
    ``disagreement`` with full depth of all judged tokens and that of the ``others``, which run every layer.

    Each token comes after full depth's own; full depth is in the same launches, so that rounding is no disagreement.
    """
    examples = examples[:MAX_EXAMPLES]
    longest = max(len(example.token_ids) for example in examples)
    ready = [copy.deepcopy(boundary).ready(adapter.device, adapter.dtype) for boundary in boundaries]
    scorer = Scorer(ready, adapter.final_norm, adapter.head)
    thresholds = [_threshold(boundary) for boundary in ready]
    rows = []
    for policy in ("deferred", *(("fitted",) if kinds is not None else ()), "copy"):
        replay = Replay(adapter, ready, kinds, kv_policy=policy, longest=longest)
        full, exited = replay.run_all(examples, [nothing_stops, gate_stops(scorer, thresholds)])
        differs = exited.choices != full.choices
        exits = exited.depths < adapter.num_layers
        rows.append(
            {
                "kv_policy": policy,
                "exit_share": round(float(exits.mean()), 4),
                "disagreement": interval(exited.disagreements(full).tolist()),
                "others": _share_by_sequence(differs, ~exits, exited.sequences),
            }
        )
    return rows


def _threshold(boundary: Boundary) -> float:
    quantiles = boundary.score_quantiles
    return quantiles[round((1 - EXIT_SHARE) * (len(quantiles) - 1))]


def _share_by_sequence(differs: np.ndarray, counted: np.ndarray, sequences: np.ndarray) -> list[float]:
    """Share of the counted rows that differ, by sequence, weighted by their number."""
    counts = np.bincount(sequences[counted], minlength=int(sequences.max()) + 1)
    sums = np.bincount(sequences[counted], weights=differs[counted], minlength=len(counts))
    has_some = np.flatnonzero(counts)
    if not len(has_some):
        return [0.0, 0.0, 0.0]
    return interval((sums[has_some] / counts[has_some]).tolist(), counts[has_some].tolist())
