"""Means over prompts with 95 % intervals: the prompt is the unit, whatever is counted within it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tide_ray.calibrate.certify_pvalues import binomial_cdf

BOOTSTRAPS = 1000
TAIL = 0.025
BISECTIONS = 60
NORMAL_QUANTILE = 1.959963984540054
FLIPS, FLIPS_AT_A_TIME = 10_000, 100


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Weighted mean over prompts, with a 95 % interval by resampling them (bootstrap): ``[mean, low, high]``."""
    given = np.asarray(values, dtype=float)
    shares = np.ones(len(given)) if weights is None else np.asarray(weights, dtype=float)
    draws = _draws(len(given))
    means = (given * shares)[draws].sum(1) / shares[draws].sum(1)
    return _rounded(np.average(given, weights=shares), *np.quantile(means, [TAIL, 1 - TAIL]))


def median_interval(values: Sequence[float]) -> list[float]:
    """Median over prompts, with a 95 % interval by resampling them: ``[median, low, high]``."""
    given = np.asarray(values, dtype=float)
    medians = np.median(given[_draws(len(given))], axis=1)
    return _rounded(np.median(given), *np.quantile(medians, [TAIL, 1 - TAIL]))


def exact_interval(successes: Sequence[bool]) -> list[float]:
    """Share of prompts, with an exact 95 % interval (Clopper and Pearson 1934): ``[share, low, high]``.

    Resampling says nothing of a share that is 0 or 1, which these often are.
    """
    count, num = sum(map(bool, successes)), len(successes)
    low = _root(lambda p: 1 - binomial_cdf(count - 1, num, p), TAIL) if count else 0.0
    high = _root(lambda p: 1 - binomial_cdf(count, num, p), 1 - TAIL) if count < num else 1.0
    return _rounded(count / num, low, high)


def score_interval(count: int, num: int) -> list[float]:
    """Share ``count / num``, with a 95 % interval (Wilson 1927) for any number of prompts: ``[share, low, high]``."""
    share, z2 = count / num, NORMAL_QUANTILE**2
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * num)) / num) / (1 + z2 / num)
    return _rounded(share, max(middle - half, 0.0), min(middle + half, 1.0))


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """Two-sided p-value that paired differences are as likely above 0 as below (Fisher 1935, Pitman 1937).

    Their sum is compared with sums under random signs, the observed one counted among them (Phipson and Smyth 2010).
    """
    given = np.asarray(differences, dtype=float)
    given = given[given != 0]
    if not len(given):
        return 1.0
    generator = np.random.default_rng(0)
    observed = abs(given.sum()) * (1 - 1e-12)  # the same sum in another order of adding
    extreme = 0
    for _ in range(FLIPS // FLIPS_AT_A_TIME):
        signs = generator.integers(0, 2, (FLIPS_AT_A_TIME, len(given))) * 2.0 - 1
        extreme += int((np.abs(signs @ given) >= observed).sum())
    return (1 + extreme) / (1 + FLIPS)


def _draws(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num, (BOOTSTRAPS, num))


def _root(rising: Callable[[float], float], value: float) -> float:
    """Where a function that rises on (0, 1) reaches ``value``."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def _rounded(*values: float) -> list[float]:
    return [round(float(value), 5) for value in values]
