"""The drift test by betting: how often it raises a false alarm, and how soon a true one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tide_ray import UserError
from tide_ray.calibrate.drift import DriftTest
from tide_ray.data.job_config import GenerateJobConfig

EPSILON, DELTA = 0.05, 0.1
REPETITIONS, LENGTH = 400, 1500


def losses_with_mean(kind: str, mean: float, shape: tuple[int, int], seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "zero or one":
        return (random.random(shape) < mean).astype(float)
    if kind == "beta":
        return random.beta(2 * mean / (1 - mean), 2.0, shape)
    if kind == "in turns":  # bursts of high losses and long calms, at the bound in every single step all the same
        level = np.where(np.arange(shape[1]) // 40 % 2, 0.9, 0.1)
        return (random.random(shape) < mean / level) * level
    return np.full(shape, mean)


@pytest.mark.parametrize("kind", ["zero or one", "beta", "in turns", "constant"])
def test_false_alarms_at_the_bound_are_rarer_than_promised(kind: str) -> None:
    """Any look at the test, at any time, may stop a job: 1,500 looks each, at the worst rate that is allowed."""
    runs = losses_with_mean(kind, EPSILON, (REPETITIONS, LENGTH), seed=3)
    assert abs(runs.mean() - EPSILON) < 0.002
    alarms = sum(trips(run) is not None for run in runs)
    # Of 400 runs at a rate of 0.1 there are more than 58 once in 500 times.
    assert alarms <= (0 if kind == "constant" else 58)


@pytest.mark.parametrize("kind", ["zero or one", "beta"])
def test_below_the_bound_alarms_are_very_rare(kind: str) -> None:
    runs = losses_with_mean(kind, 0.6 * EPSILON, (REPETITIONS, LENGTH), seed=4)
    assert sum(trips(run) is not None for run in runs) <= 0.02 * REPETITIONS


@pytest.mark.parametrize(("calm", "within"), [(0, 120), (1000, 250)])
def test_a_change_is_noticed_soon_also_after_a_long_calm(calm: int, within: int) -> None:
    before = losses_with_mean("beta", 0.6 * EPSILON, (50, calm), seed=5)
    after = losses_with_mean("beta", 4 * EPSILON, (50, within), seed=6)
    found = [trips(run) for run in np.concatenate([before, after], axis=1)]
    assert sum(number is not None and number > calm for number in found) >= 48


def test_the_test_says_what_it_found() -> None:
    test = DriftTest(0.02, 0.05)
    assert (test.capital, test.has_tripped, test.mean_loss) == (1.0, False, 0.0)
    for _ in range(40):
        test.add(0.5)
    facts = test.facts()
    assert facts["num_shadowed"] == 40
    assert facts["mean_loss"] == 0.5
    assert facts["tripped_after"] == next(n for n in range(1, 40) if trips(np.full(n, 0.5), 0.02, 0.05))
    assert test.has_tripped
    for _ in range(40):
        test.add(0.0)
    assert test.facts()["tripped_after"] == facts["tripped_after"], "an alarm stays"


@pytest.mark.parametrize("loss", [-0.1, 1.1, float("nan")])
def test_a_loss_outside_its_range_is_refused(loss: float) -> None:
    with pytest.raises(ValueError, match="a loss must be in"):
        DriftTest(0.02, 0.05).add(loss)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shadow": 1.5, "exits": "r", "max_disagreement": 0.1}, r"shadow must be in \(0, 1\], got 1.5"),
        ({"shadow": 0.0, "exits": "r", "max_disagreement": 0.1}, r"shadow must be in \(0, 1\], got 0.0"),
        ({"shadow": 0.1, "exits": "r"}, "shadow needs max_disagreement, a certified bound to watch, got 0.1"),
        (
            {"shadow": 0.1, "exits": "r", "max_disagreement": 0.1, "length_column": "n"},
            "length_column must not be given with shadow, got 'n'",
        ),
    ],
)
def test_a_share_that_cannot_be_shadowed_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GenerateJobConfig.build(values)


def trips(losses: np.ndarray, epsilon: float = EPSILON, delta: float = DELTA) -> int | None:
    """After how many losses the test raises an alarm."""
    test = DriftTest(epsilon, delta)
    for loss in losses:
        test.add(float(loss))
        if test.has_tripped:
            return test.tripped_after
    return None
