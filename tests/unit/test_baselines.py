"""Thresholds that make another rule cost what a setting costs."""

from __future__ import annotations

import numpy as np
import pytest

from exit_helpers import make_routers
from references import loaded
from tide_ray.calibrate.baselines import capacity_for, fixed_layers, prefill_share_of, threshold_for
from tiny_models import build_tiny_model


@pytest.mark.parametrize("mean_depth", [4.5, 6.0, 7.5])
def test_a_threshold_lets_rows_leave_at_the_mean_depth_asked_for(mean_depth: float) -> None:
    rng = np.random.default_rng(0)
    scores = [rng.random(4000), rng.random(4000)]
    threshold = threshold_for(scores, (4, 6), 8, mean_depth)
    left = np.where(scores[0] >= threshold, 4, np.where(scores[1] >= threshold, 6, 8))
    assert left.mean() == pytest.approx(mean_depth, abs=0.01)


def test_a_depth_that_no_threshold_reaches_gets_the_nearest() -> None:
    scores = [np.array([0.2, 0.9, 0.9, 0.9])]
    assert threshold_for(scores, (2,), 4, 2.4) == 0.9
    assert threshold_for(scores, (2,), 4, 2.1) == 0.2


@pytest.mark.parametrize("mean_depth", [4.2, 6.0, 8.0])
def test_a_capacity_lets_rows_leave_at_the_mean_depth_asked_for(mean_depth: float) -> None:
    capacity = capacity_for((4, 6), 8, mean_depth)
    left = (1 - capacity) * 4 + capacity * (1 - capacity) * 6 + capacity**2 * 8
    assert left == pytest.approx(mean_depth, abs=1e-3)


def test_fixed_layers_are_inside_the_model() -> None:
    assert fixed_layers(0.99, 4)["every token stops at one depth"]["exit_layer"] == 3
    assert fixed_layers(0.01, 4)["every token stops at one depth"]["exit_layer"] == 1
    assert fixed_layers(0.5, 4)["layers skipped evenly"]["static_cost"] == 0.5


def test_a_share_of_the_prompt_is_found_from_its_threshold() -> None:
    boundary = make_routers(loaded(build_tiny_model("llama")), (2,)).boundaries[0]
    assert prefill_share_of(boundary, boundary.prefill_threshold(0.75)) == pytest.approx(0.75)
    assert prefill_share_of(boundary, None) is None
    assert prefill_share_of(boundary, -1.0) is None
