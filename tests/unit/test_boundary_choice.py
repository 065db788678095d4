"""Which boundaries a checkpoint gets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tide_ray.calibrate.choice import BoundarySet, best_set, expected_saving, promising_sets
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.gates import Gate
from tide_ray.exits.readouts import ExitHead

NUM_LAYERS = 30


def boundary(depth: int) -> Boundary:
    return Boundary(depth, ExitHead(4), Gate(4, 8), thresholds={"0.02": 0.5})


def test_saving_counts_layers_not_run_less_what_asking_costs() -> None:
    half = np.array([0.9, 0.9, 0.1, 0.1])
    none = np.array([0.1, 0.1, 0.1, 0.1])
    assert expected_saving([boundary(24)], [half], NUM_LAYERS) == pytest.approx((0.5 * 6 - 0.6) / 30)
    assert expected_saving([boundary(24)], [none], NUM_LAYERS) < 0
    # Tokens that left at the first boundary are not asked at the second, and do not leave there again.
    both = expected_saving([boundary(15), boundary(24)], [half, half], NUM_LAYERS)
    assert both == pytest.approx((0.5 * 15 - 0.6 - 0.5 * 0.6) / 30)


def test_sets_are_ranked_by_saving() -> None:
    candidates = [boundary(12), boundary(24)]
    scores = [np.array([0.1, 0.1, 0.1, 0.9]), np.array([0.9, 0.9, 0.1, 0.9])]
    ranked = promising_sets(candidates, scores, NUM_LAYERS)
    assert [one.numbers for one in ranked] == [(0, 1), (0,), (1,)]
    assert [one.saving for one in ranked] == sorted((one.saving for one in ranked), reverse=True)


def test_a_larger_saving_that_damages_later_tokens_is_not_chosen() -> None:
    """Depths 12 and 24 promised the most by the errors of the exiting tokens alone; replayed, the approximate K/V of
    tokens that exit at 12 made twice as many later tokens wrong."""
    shallow = BoundarySet((0, 1), saving=0.12, disagreement=0.045)
    deep = BoundarySet((1,), saving=0.08, disagreement=0.015)
    assert best_set([shallow, deep]) == deep
    assert best_set([replace(shallow, disagreement=0.019), deep]).numbers == (0, 1)


def test_without_a_set_that_is_good_enough_the_least_damage_wins() -> None:
    sets = [BoundarySet((0, 1), 0.12, 0.09), BoundarySet((1,), 0.08, 0.05), BoundarySet((0,), 0.1, 0.06)]
    assert best_set(sets).numbers == (1,)
