"""Certification is right as often as it says, for every p-value and along a path; and how many prompts it takes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tide_ray import UserError
from tide_ray.calibrate.certify_pvalues import (
    KINDS,
    binomial,
    check_enough,
    hoeffding_bentkus,
    last_certified,
    p_value,
    prompts_needed,
    wsr,
)

DELTA = 0.05


def draw(rng: np.random.Generator, kind: str, risk: float, num: int) -> np.ndarray:
    """Losses with this mean: 0 or 1 for the binomial, else shares of tokens of unequally hard prompts."""
    if kind == "binomial":
        return (rng.random(num) < risk).astype(float)
    hard = rng.beta(0.5, 0.5 * (1 - risk) / risk, num)
    return rng.binomial(64, hard) / 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("epsilon", "num"), [(0.05, 150), (0.1, 60)])
def test_p_values_are_uniform_or_larger_when_the_risk_is_epsilon(kind: str, epsilon: float, num: int) -> None:
    rng = np.random.default_rng(1)
    values = np.array([p_value(draw(rng, kind, epsilon, num), epsilon, DELTA, kind) for _ in range(1000)])
    for level in (0.01, 0.05, 0.1, 0.3, 0.6):
        slack = 3 * math.sqrt(level * (1 - level) / len(values))
        assert (values <= level).mean() <= level + slack, f"P(p <= {level})"


@pytest.mark.parametrize("kind", KINDS)
def test_settings_above_epsilon_are_certified_no_more_often_than_delta(kind: str) -> None:
    """Fixed-sequence testing over a path whose risk passes epsilon between two neighbours, 400 times."""
    rng = np.random.default_rng(2)
    epsilon, num, repetitions = 0.05, 400, 400
    risks = np.array([0.004, 0.01, 0.02, 0.03, 0.04, 0.0505, 0.052, 0.06, 0.08])
    violations, certified = 0, []
    for _ in range(repetitions):
        values = [p_value(draw(rng, kind, risk, num), epsilon, DELTA, kind) for risk in risks]
        last = last_certified(values, DELTA)
        certified.append(-1 if last is None else last)
        violations += last is not None and risks[last] > epsilon
    slack = 2.33 * math.sqrt(DELTA * (1 - DELTA) / repetitions)
    assert violations / repetitions <= DELTA + slack
    assert np.median(certified) >= 2, "a test that certifies nothing is valid, too"


def test_the_last_certified_setting_is_returned_not_the_first_that_failed() -> None:
    """A published implementation returns the first uncertified one."""
    assert last_certified([0.001, 0.02, 0.051, 0.001], DELTA) == 1
    assert last_certified([0.05, 0.0501], DELTA) == 0
    assert last_certified([0.01, 0.02], DELTA) == 1
    assert last_certified([0.06, 0.0], DELTA) is None
    assert last_certified([], DELTA) is None


def test_testing_stops_at_the_first_failure() -> None:
    asked = []

    def values() -> object:
        for value in (0.01, 0.5, 0.01):
            asked.append(value)
            yield value

    assert last_certified(values(), DELTA) == 0  # type: ignore[arg-type]
    assert asked == [0.01, 0.5]


def test_the_binomial_p_value_is_the_distribution_function() -> None:
    losses = np.zeros(20)
    losses[:3] = 1
    exact = sum(math.comb(20, k) * 0.3**k * 0.7 ** (20 - k) for k in range(4))
    assert binomial(losses, 0.3) == pytest.approx(exact, rel=1e-9)
    assert binomial(np.ones(5), 0.3) == 1.0
    assert binomial(np.zeros(10_000), 0.01) == pytest.approx(0.99**10_000, rel=1e-6)


def test_hoeffding_bentkus_takes_the_better_of_both_bounds() -> None:
    assert hoeffding_bentkus(np.zeros(299), 0.01) == pytest.approx(0.99**299)
    assert hoeffding_bentkus(np.full(100, 0.2), 0.1) == 1.0, "the mean is above epsilon"
    losses = np.zeros(1000)
    losses[:5] = 1
    bentkus = math.e * sum(math.comb(1000, k) * 0.02**k * 0.98 ** (1000 - k) for k in range(6))
    assert hoeffding_bentkus(losses, 0.02) == pytest.approx(min(bentkus, hoeffding_bentkus(losses, 0.02)), rel=1e-9)


def test_betting_certifies_one_percent_from_a_thousand_prompts_where_the_mean_alone_does_not() -> None:
    rng = np.random.default_rng(3)
    losses = rng.binomial(128, 0.005, 1000) / 128
    assert wsr(losses, 0.01, DELTA) <= DELTA < hoeffding_bentkus(losses, 0.01)


def test_the_planner_says_how_many_prompts_it_takes() -> None:
    assert prompts_needed(0.01, DELTA, "binomial") == 299
    assert prompts_needed(0.01, DELTA, "hoeffding-bentkus") == 299
    assert prompts_needed(0.01, DELTA, "binomial", 0.005) == pytest.approx(1184, rel=0.02)
    assert prompts_needed(0.01, DELTA, "hoeffding-bentkus", 0.005) == pytest.approx(1772, rel=0.02)
    assert 299 < prompts_needed(0.01, DELTA, "wsr") < prompts_needed(0.01, DELTA, "wsr", 0.005) < 1000
    for kind in KINDS:
        num = prompts_needed(0.05, DELTA, kind)
        assert p_value(np.zeros(num), 0.05, DELTA, kind) <= DELTA < p_value(np.zeros(num - 1), 0.05, DELTA, kind)


def test_too_few_prompts_are_refused_with_the_number_it_takes() -> None:
    check_enough(299, [0.05, 0.01], DELTA, "binomial")
    with pytest.raises(UserError) as caught:
        check_enough(298, [0.05, 0.01], DELTA, "binomial")
    assert str(caught.value).startswith("num_prompts: 1.00% at delta 0.05 needs at least 299 certification prompts")
    assert str(caught.value).endswith("got 298")
    with pytest.raises(UserError, match="would take more than"):
        check_enough(10, [1e-9], DELTA, "binomial")


def test_losses_that_a_p_value_does_not_hold_for_are_refused() -> None:
    with pytest.raises(ValueError, match="0 or 1 only"):
        p_value(np.array([0.0, 0.5]), 0.1, DELTA, "binomial")
    for losses in ([], [-0.1], [1.5]):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            p_value(np.array(losses), 0.1, DELTA, "wsr")
    with pytest.raises(ValueError, match="cannot be certified"):
        prompts_needed(0.01, DELTA, "wsr", 0.01)
