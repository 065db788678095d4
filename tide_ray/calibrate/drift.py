"""Whether a certified bound still holds while a job runs: shadowed prompts are judged, and a test says when to stop.

A shadowed prompt is answered at full depth as well, and its loss is measured as certification measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tide_ray.calibrate.certify_losses import TokenLosses
from tide_ray.calibrate.corpus import Example
from tide_ray.engine.engine import TideEngine
from tide_ray.exits.certificates import Certificate

MAX_STAKE = 0.75
"""Most of the capital that one loss can cost."""

MEMORY = 50
"""Losses that bets are made from: prompts may change at any time."""


class DriftTest:
    """Evidence, loss by loss, that the expected loss of a prompt is above ``epsilon``.

    A gambler bets b_i >= 0 on each loss x_i before it is seen, and x_i multiplies his stake by 1 + b_i (x_i - epsilon).
    While no expected loss is above epsilon given those before it, his capital is a non-negative supermartingale, and
    the chance that it ever reaches 1 / delta times what he began with is at most delta (Ville's inequality): the test
    may be looked at after every loss. Bets are aGRAPA's (Waudby-Smith and Ramdas, JRSS B 2024, arXiv 2010.09686),
    (m - epsilon) / (v + (m - epsilon)^2) with mean m and variance v of the last losses. He brings his capital in
    slowly, 1 / (t (t + 1)) of it before loss t, so that bets lost in a calm beginning do not blind him to a change.

    Args:
        epsilon: bound that is tested, in (0, 1).
        delta: greatest chance of a false alarm, however long it runs.
    """

    def __init__(self, epsilon: float, delta: float) -> None:
        if not 0 < epsilon < 1 or not 0 < delta < 1:
            raise ValueError(f"epsilon and delta must be in (0, 1), got {epsilon!r} and {delta!r}")
        self.epsilon = epsilon
        self.delta = delta
        self.num_losses = 0
        self.sum_losses = 0.0
        self.tripped_after: int | None = None
        self._staked = 0.0
        self._mean, self._variance = epsilon, epsilon * (1 - epsilon)

    @property
    def capital(self) -> float:
        """Now, of 1 at the beginning."""
        return self._staked + 1 / (self.num_losses + 1)

    @property
    def has_tripped(self) -> bool:
        return self.tripped_after is not None

    @property
    def mean_loss(self) -> float:
        return self.sum_losses / self.num_losses if self.num_losses else 0.0

    def add(self, loss: float) -> None:
        """Take in the next loss, in [0, 1]. Their order must not depend on them."""
        if not 0 <= loss <= 1:
            raise ValueError(f"a loss must be in [0, 1], got {loss!r}")
        edge = self._mean - self.epsilon
        bet = min(max(edge, 0.0) / (self._variance + edge**2), MAX_STAKE / self.epsilon)
        self.num_losses += 1
        self.sum_losses += loss
        stake = self._staked + 1 / (self.num_losses * (self.num_losses + 1))
        self._staked = stake * (1 + bet * (loss - self.epsilon))
        weight = 1 / min(self.num_losses + 1, MEMORY)
        self._mean += weight * (loss - self._mean)
        self._variance += weight * ((loss - self._mean) ** 2 - self._variance)
        if not self.has_tripped and self.capital >= 1 / self.delta:
            self.tripped_after = self.num_losses

    def facts(self) -> dict[str, Any]:
        """For run records."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "num_shadowed": self.num_losses,
            "mean_loss": round(self.mean_loss, 5),
            "log_capital": round(math.log(self.capital), 3),
            "tripped_after": self.tripped_after,
        }


def shadow_loss(
    engine: TideEngine, certificate: Certificate, prompt_ids: Sequence[int], own: Sequence[int], full: Sequence[int]
) -> float:
    """Loss of one prompt, in [0, 1], as the certificate was made with.

    ``tokens``: share of full depth's answer ``full`` that the certified setting would not have chosen, every boundary
    on and K/V as the engine has them. ``answers``: whether the engine's answer ``own`` differs.
    """
    if certificate.loss == "answers":
        return float(list(own) != list(full))
    exits = engine.runner.exits
    assert exits is not None, "a certificate comes with exits"
    example = Example([*prompt_ids, *full[:-1]], len(prompt_ids) - 1, full[-1])
    losses = TokenLosses(
        engine.runner.adapter,
        exits.boundaries,
        kv_policy=exits.kv_policy,
        prefill_tail=certificate.prefill_tail,
        longest=len(example.token_ids),
    )
    return float(losses.measure([example], [certificate.setting])[0].losses[0])
