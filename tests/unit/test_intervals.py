"""Intervals by prompt, against those that are known."""

from __future__ import annotations

import pytest

from tide_ray.calibrate.intervals import exact_interval, interval, median_interval


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
