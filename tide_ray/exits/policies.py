"""Exit policies: which rows of a launch stop at a boundary.

A policy sees the rows that may stop and says for each whether it does, with a score where it has one. Its answer is
read on the host once per launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tide_ray.exits.checkpoint import Boundary

MEASURES = ("probability", "margin", "entropy")


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that may stop at a boundary, N of them.

    ``states``: unit-rms ``[N, D]``; ``thresholds``: score that each row needs, infinite where it must go on;
    ``scorers``: ``router`` or ``confidence``, for each row; ``keys``: (request seed, position), for each row.
    """

    boundary: int
    states: Tensor
    thresholds: np.ndarray
    scorers: Sequence[str]
    keys: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """For each row whether it stops (bool ``[N]``), and its score (NaN where the policy has none)."""

    stops: np.ndarray
    scores: np.ndarray


class ExitPolicy(Protocol):
    """Decides for the rows of one launch at one boundary."""

    def decide(self, rows: Candidates) -> Verdict:
        """Who exits, and with which score: ``[N]`` each, for the N rows that are asked."""


class Scorer:
    """Scores rows by gate or by confidence.

    Args:
        boundaries: the calibrated boundaries, shallowest first.
        final_norm, head: the model's own: pre-norm states ``[1, N, D]`` -> normed -> logits ``[N, V]``.
        measure: which confidence (CALM, arXiv 2207.07061): top-1 ``probability``, ``margin`` between the first two
            probabilities, or ``entropy`` as 1 - H / log V; each from 0 to 1, higher is surer.
    """

    def __init__(
        self,
        boundaries: Sequence[Boundary],
        final_norm: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        measure: str = "probability",
    ) -> None:
        self._boundaries = boundaries
        self._final_norm = final_norm
        self._head = head
        self._measure = measure

    def by_gate(self, boundary: int, states: Tensor) -> Tensor:
        """Gate scores of unit-rms states ``[N, D]``, float32 ``[N]``."""
        gate = self._boundaries[boundary].gate
        return gate.scores(states, self._normed(boundary, states)[0] if gate.shortlist is not None else None)

    def by_confidence(self, boundary: int, states: Tensor) -> Tensor:
        """Confidence of the exit head through the whole LM head, float32 ``[N]``."""
        return confidence_scores(self._head(self._normed(boundary, states)), self._measure)

    def _normed(self, boundary: int, states: Tensor) -> Tensor:
        return self._final_norm(self._boundaries[boundary].head(states)[None])


class ScoredExits:
    """``router`` and ``confidence``: a row stops when its score reaches its threshold."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def decide(self, rows: Candidates) -> Verdict:
        """Rows exit whose score reaches their threshold."""
        scores = self._scores(rows).cpu().numpy()
        return Verdict(scores >= rows.thresholds, scores)

    def _scores(self, rows: Candidates) -> Tensor:
        kinds = set(rows.scorers)
        if kinds == {"router"}:
            return self._scorer.by_gate(rows.boundary, rows.states)
        confidence = self._scorer.by_confidence(rows.boundary, rows.states)
        if kinds == {"confidence"}:
            return confidence
        is_router = torch.tensor([scorer == "router" for scorer in rows.scorers], device=rows.states.device)
        return torch.where(is_router, self._scorer.by_gate(rows.boundary, rows.states), confidence)


class CapacityExits:
    """A fixed share of the rows goes deeper: those with the lowest gate scores (mixture-of-depths, arXiv 2404.02258).

    Which row goes on depends on the other rows of the launch, so answers depend on the batch.
    """

    def __init__(self, scorer: Scorer, capacity: float) -> None:
        self._scorer = scorer
        self._capacity = capacity

    def decide(self, rows: Candidates) -> Verdict:
        """The surest rows exit, as many as do not fit the capacity; rows with an infinite threshold never do."""
        scores = self._scorer.by_gate(rows.boundary, rows.states).cpu().numpy()
        may_stop = np.isfinite(rows.thresholds)
        num_stops = int((1 - self._capacity) * len(scores) + 0.5)
        order = np.argsort(np.where(may_stop, -scores, np.inf), kind="stable")[:num_stops]
        stops = np.zeros(len(scores), dtype=bool)
        stops[order] = True
        return Verdict(stops & may_stop, scores)


class ForcedExits:
    """A seeded random share of the rows stops, whatever their states are: for measuring mechanics apart from quality.

    A row's fate depends on its request's seed, its position and the boundary only, not on the batch.

    Args:
        shares: for each boundary the share of the rows reaching it that stops there.
        unanimous: rows stop only when all rows of the launch would (the rule of TIDE's ``generate``).
    """

    def __init__(self, shares: Sequence[float], seed: int = 0, *, unanimous: bool = False) -> None:
        self.shares = tuple(shares)
        self._seed = seed
        self._unanimous = unanimous

    def decide(self, rows: Candidates) -> Verdict:
        """Rows exit by their draw, or by that of all where exits are unanimous; there are no scores (NaN)."""
        stops = self._draws(rows) < self.shares[rows.boundary]
        if self._unanimous:
            stops = np.full_like(stops, stops.all())
        return Verdict(stops & np.isfinite(rows.thresholds), np.full(len(stops), np.nan))

    def _draws(self, rows: Candidates) -> np.ndarray:
        """Numbers from 0 to 1, float64 ``[N]``: the rows' keys through the mixing steps of SplitMix64."""
        seeds, positions = (np.array([key[i] % 2**64 for key in rows.keys], dtype=np.uint64) for i in (0, 1))
        start = np.uint64((rows.boundary * 0x94D049BB133111EB ^ self._seed) % 2**64)
        bits = seeds * np.uint64(0x9E3779B97F4A7C15) + positions * np.uint64(0xBF58476D1CE4E5B9) + start
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def confidence_scores(logits: Tensor, measure: str) -> Tensor:
    """How sure ``[N, V]`` logits are, in float32 ``[N]`` from 0 to 1."""
    logits = logits.float()
    if measure == "probability":
        return (logits.amax(-1) - logits.logsumexp(-1)).exp()
    probabilities = logits.softmax(-1)
    if measure == "margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return first - second
    entropy = torch.special.entr(probabilities).sum(-1)
    return 1 - entropy / torch.log(torch.tensor(float(logits.shape[-1])))
