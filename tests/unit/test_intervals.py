"""Intervals by prompt, against those that are known."""

from __future__ import annotations

import itertools

import pytest

from tide_ray.calibrate.intervals import (
    exact_interval,
    interval,
    median_interval,
    score_interval,
    sign_flip_p_value,
)


def test_intervals_are_over_prompts() -> None:
    mean, low, high = interval([0.0, 0.1, 0.2, 0.1] * 20)
    assert mean == pytest.approx(0.1)
    assert low < mean < high
    assert interval([0.0, 1.0], weights=[3, 1])[0] == 0.25
    assert interval([0.5])[0] == 0.5


@pytest.mark.parametrize(
    ("count", "num", "low", "high"),
    # The first as tabulated by Clopper and Pearson; at the ends the limits have closed forms.
    [(4, 10, 0.1216, 0.7376), (0, 10, 0.0, 1 - 0.025**0.1), (10, 10, 0.025**0.1, 1.0), (1, 1, 0.025, 1.0)],
)
def test_shares_have_exact_intervals(count: int, num: int, low: float, high: float) -> None:
    found = exact_interval([True] * count + [False] * (num - count))
    assert found == pytest.approx([count / num, low, high], abs=1e-4)


def test_medians_are_resampled() -> None:
    middle, low, high = median_interval([1, 2, 3, 4, 100] * 10)
    assert (middle, low <= 3 <= high, high < 100) == (3, True, True)


@pytest.mark.parametrize(
    ("count", "num", "low", "high"),
    # Newcombe 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_score_intervals_are_those_of_the_literature(count: int, num: int, low: float, high: float) -> None:
    assert score_interval(count, num) == pytest.approx([count / num, low, high], abs=1e-4)


def test_flipped_signs_give_the_share_of_sums_as_far_from_zero() -> None:
    differences = [3.0, 1.5, -0.5, 2.0, 0.25, 0.0, 4.0, -1.0, 0.75]
    flipped = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    exact = sum(one >= abs(sum(differences)) for one in flipped) / len(flipped)
    assert 0.01 < exact < 0.2
    assert sign_flip_p_value(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p_value([-value for value in differences]) == sign_flip_p_value(differences)
    assert sign_flip_p_value([0.0, 0.0]) == 1.0
    assert sign_flip_p_value([1.0] * 50) == pytest.approx(1 / 10_001), "no p-value is 0"
