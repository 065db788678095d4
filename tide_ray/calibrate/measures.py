"""What is reported of a candidate boundary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tide_ray.calibrate.gate_training import auc, calibration_error, precision_at, reliability, threshold_at
from tide_ray.calibrate.judge import Judged
from tide_ray.exits.checkpoint import Boundary

ERROR_LEVELS = (0.01, 0.02, 0.05)
COSINE = 0.98
COVERAGES = tuple(n / 20 for n in range(1, 21))


def depth_metrics(
    boundary: Boundary, scores: np.ndarray, test: Judged, depths: Sequence[int], num_layers: int
) -> dict[str, Any]:
    """Figures of one boundary on the test split, whose gate scores are ``scores``.

    Shares are of all tokens; errors are at the thresholds set on the calibration split, ``oracle`` shares at thresholds
    chosen on the test split itself. ``reliability``: (mean score, share right here and later, rows) of each bin of
    scores; ``coverage``: share right among the surest tokens, for each share of them.
    """
    depth = boundary.depth
    right = test.right(depth)
    lasting = test.lasting(depth, depths)
    probability = test.rows.take(f"probability_{depth}").numpy()
    cosines = test.rows.take(f"cosine_{depth}").numpy()
    exits: dict[str, dict[str, float]] = {}
    for level in ERROR_LEVELS:
        stops = scores >= boundary.thresholds[str(level)]
        exits[str(level)] = {
            "share": _rounded(stops.mean()),
            "error": _rounded((~right[stops]).mean()) if stops.any() else 0.0,
            "oracle_share": _rounded((scores >= threshold_at(scores, right, level)).mean()),
            "oracle_share_by_probability": _rounded((probability >= threshold_at(probability, right, level)).mean()),
            "ceiling": _rounded(1 / (1 - stops.mean() * (1 - depth / num_layers))),
        }
    return {
        "depth": depth,
        "lens_agreement": _rounded(test.lens_right.get(depth, float("nan"))),
        "head_agreement": _rounded(right.mean()),
        "mean_cosine": _rounded(cosines.mean()),
        "share_cosine_above_0.98": _rounded((cosines > COSINE).mean()),
        "auc": _rounded(auc(scores, lasting)),
        "auc_by_probability": _rounded(auc(probability, right)),
        "ece": _rounded(calibration_error(scores, lasting)),
        "reliability": [[_rounded(score), _rounded(share), n] for score, share, n in reliability(scores, lasting)],
        "coverage": {
            "share": list(COVERAGES),
            "by_gate": [_rounded(value) for value in precision_at(scores, right, COVERAGES)],
            "by_probability": [_rounded(value) for value in precision_at(probability, right, COVERAGES)],
        },
        "exits": exits,
    }


def _rounded(value: float) -> float:
    return round(float(value), 4)
