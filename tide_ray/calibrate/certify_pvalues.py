"""Statistics of certification: p-values, fixed-sequence testing and how many prompts it takes.

Learn-then-Test (Angelopoulos et al., arXiv 2110.01052). The hypothesis is that a setting's risk, the expected loss of
a prompt, is above epsilon. Rejecting it certifies the setting. Losses are of independent prompts, each in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from tide_ray.types import UserError

KINDS = ("wsr", "hoeffding-bentkus", "binomial")
MAX_PROMPTS = 1 << 20


def p_value(losses: np.ndarray, epsilon: float, delta: float, kind: str) -> float:
    """p-value of "the risk is above ``epsilon``", valid for every number of prompts.

    Args:
        losses: one for each prompt, ``[n]``, in [0, 1] (``binomial``: 0 or 1), in an order that does not depend on
            them.
        delta: level at which it will be tested; ``wsr`` bets for it, and is valid at any other.
        kind: one of ``KINDS``. To be chosen before the losses are seen.

    Raises:
        ValueError: losses that ``kind`` has no p-value for.
    """
    losses = np.asarray(losses, dtype=float)
    if not len(losses) or losses.min() < 0 or losses.max() > 1:
        raise ValueError(f"losses must be in [0, 1] and not empty, got {losses!r}")
    if kind == "binomial":
        return binomial(losses, epsilon)
    return hoeffding_bentkus(losses, epsilon) if kind == "hoeffding-bentkus" else wsr(losses, epsilon, delta)


def binomial(losses: np.ndarray, epsilon: float) -> float:
    """Exact, for losses of 0 or 1: the probability of at most as many losses when the risk is ``epsilon``.

    Raises:
        ValueError: other losses.
    """
    if not np.isin(losses, (0.0, 1.0)).all():
        raise ValueError("the binomial p-value takes losses of 0 or 1 only")
    return binomial_cdf(int(losses.sum()), len(losses), epsilon)


def hoeffding_bentkus(losses: np.ndarray, epsilon: float) -> float:
    """For any losses in [0, 1], from their mean r alone (Bates et al., arXiv 2101.02703, and arXiv 2110.01052).

    min(exp(-n h(min(r, eps), eps)), e P(Bin(n, eps) <= ceil(n r))), where h(a, b) = a ln(a/b) + (1-a) ln((1-a)/(1-b)).
    """
    num, mean = len(losses), float(losses.mean())
    hoeffding = math.exp(-num * _relative_entropy(min(mean, epsilon), epsilon))
    # Rounded first, so that a sum of 3.0000000001 is not taken for 4.
    bentkus = math.e * binomial_cdf(math.ceil(round(num * mean, 9)), num, epsilon)
    return min(1.0, hoeffding, bentkus)


def wsr(losses: np.ndarray, epsilon: float, delta: float) -> float:
    """For any losses in [0, 1], by betting (Waudby-Smith and Ramdas, arXiv 2010.09686): strong where they vary little.

    The gambler's capital prod_i (1 - nu_i (x_i - eps)) is a non-negative supermartingale when the risk is above eps,
    so 1 / (its maximum) is a p-value by Ville's inequality. Bets follow from the losses before: nu_i = min(1,
    sqrt(2 ln(1/delta) / (n s_{i-1}))), with s the running variance, which starts as one loss of 1/2 with variance 1/4.
    """
    counts = np.arange(1, len(losses) + 1)
    means = (0.5 + np.cumsum(losses)) / (1 + counts)
    variances = (0.25 + np.cumsum((losses - means) ** 2)) / (1 + counts)
    known = np.concatenate([[0.25], variances[:-1]])
    bets = np.minimum(1.0, np.sqrt(2 * math.log(1 / delta) / (len(losses) * known)))
    capital = np.cumsum(np.log1p(-bets * (losses - epsilon)))
    return float(np.exp(-max(0.0, capital.max())))


def last_certified(p_values: Iterable[float], delta: float) -> int | None:
    """Fixed-sequence testing: number of the last setting before the first whose p-value is above ``delta``.

    Settings come in an order chosen without their losses, the safest first. Then the chance that any of those up to the
    result has a risk above epsilon is at most delta, without any correction. None: not even the first is certified.
    """
    last = None
    for number, value in enumerate(p_values):
        if value > delta:
            break
        last = number
    return last


def prompts_needed(epsilon: float, delta: float, kind: str, mean_loss: float = 0.0) -> int:
    """Fewest prompts that certify ``epsilon`` when their losses have this mean, and vary as little as they can.

    With ``mean_loss`` 0 no fewer prompts can ever do. Where losses are 0 or 1 they are spread evenly.
    """

    def suffices(num: int) -> bool:
        if kind == "binomial":
            return binomial_cdf(math.ceil(round(num * mean_loss, 9)), num, epsilon) <= delta
        return p_value(np.full(num, mean_loss), epsilon, delta, kind) <= delta

    if mean_loss >= epsilon:
        raise ValueError(f"a mean loss of {mean_loss} cannot be certified to be below {epsilon}")
    # Counts of losses are whole, so more prompts may do worse: steps are small, and no bisection.
    before, num = 0, 1
    while not suffices(num):
        before, num = num, num + max(1, num // 100)
        if num > MAX_PROMPTS:
            raise UserError(f"epsilons: {epsilon!r} would take more than {MAX_PROMPTS:,} prompts at delta {delta!r}")
    return next(n for n in range(before + 1, num + 1) if suffices(n))


def check_enough(num_prompts: int, epsilons: Sequence[float], delta: float, kind: str) -> None:
    """Refuse a certification that no losses could pass.

    Raises:
        UserError: saying how many prompts the smallest epsilon takes.
    """
    epsilon = min(epsilons)
    needed = prompts_needed(epsilon, delta, kind)
    if num_prompts < needed:
        likely = prompts_needed(epsilon, delta, kind, mean_loss=epsilon / 2)
        raise UserError(
            f"num_prompts: {epsilon:.2%} at delta {delta:g} needs at least {needed} certification prompts without any "
            f"disagreement, and {likely} with half of it, got {num_prompts}"
        )


def _relative_entropy(a: float, b: float) -> float:
    """Of Bernoulli(a) to Bernoulli(b), in nats; 0 ln 0 = 0."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def binomial_cdf(count: int, num: int, probability: float) -> float:
    """P(Bin(num, probability) <= count), summed in logarithms."""
    if count >= num:
        return 1.0
    if probability >= 1:
        return 0.0
    log_odds = math.log(probability) - math.log1p(-probability)
    log_first = num * math.log1p(-probability)
    total = math.lgamma(num + 1)
    terms = [total - math.lgamma(k + 1) - math.lgamma(num - k + 1) + k * log_odds + log_first for k in range(count + 1)]
    return min(1.0, float(np.exp(np.logaddexp.reduce(terms))))
