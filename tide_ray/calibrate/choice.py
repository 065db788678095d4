"""Which candidate boundaries a checkpoint gets: the largest saving whose damage, K/V of exits included, stays small.

A gate's error counts wrong choices of the tokens that exit. Their K/V in deeper layers are approximate too, which costs
later tokens, the more the earlier they exit. So the most promising sets are replayed with everything in place.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.replay import Replay, ReplayRows, Stops
from tide_ray.calibrate.trace import MAX_ROWS
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.policies import Scorer
from tide_ray.exits.rotary import Rotary
from tide_ray.models.adapter import Adapter

MAX_BOUNDARIES = 2
MAX_REPLAYED = 6
MAX_EXAMPLES = 48
LEVEL = "0.02"
MAX_DISAGREEMENT = 0.04
"""Of all tokens, above the noise floor, at the thresholds of LEVEL: K/V of exits may cost what their errors do."""
BOUNDARY_COST = 0.6
"""What asking a boundary costs, in layers: exit head, gate and shortlist, parting the rows and one more launch."""


@dataclass(frozen=True, slots=True)
class BoundarySet:
    """Candidates by number. ``saving``: expected share of layer runs; ``disagreement``: share of all tokens that
    differ from full depth's, less the noise floor; None where the set was not replayed."""

    numbers: tuple[int, ...]
    saving: float
    disagreement: float | None = None


def promising_sets(candidates: Sequence[Boundary], scores: Sequence[np.ndarray], num_layers: int) -> list[BoundarySet]:
    """All sets of at most MAX_BOUNDARIES candidates, the largest expected saving first."""
    numbers = range(len(candidates))
    sets = [s for size in range(1, MAX_BOUNDARIES + 1) for s in itertools.combinations(numbers, size)]
    priced = [
        BoundarySet(s, expected_saving([candidates[n] for n in s], [scores[n] for n in s], num_layers)) for s in sets
    ]
    return sorted(priced, key=lambda one: -one.saving)


def is_acceptable(one: BoundarySet) -> bool:
    """Whether a replayed set stays within MAX_DISAGREEMENT."""
    return one.disagreement is not None and one.disagreement <= MAX_DISAGREEMENT


def best_set(replayed: Sequence[BoundarySet]) -> BoundarySet:
    """The largest saving of the acceptable; without any, the least disagreement."""
    within = [s for s in replayed if is_acceptable(s)]
    if within:
        return max(within, key=lambda s: s.saving)
    return min(replayed, key=lambda s: (np.inf if s.disagreement is None else s.disagreement, -s.saving))


class SetReplay:
    """Replays sets of boundaries over held-out sequences.

    Args:
        kinds: how layers rotate K; None: K/V of exits are copied.
    """

    def __init__(
        self, adapter: Adapter, kinds: Sequence[Rotary] | None, examples: Sequence[Example], *, kv_policy: str
    ) -> None:
        self._adapter = adapter
        self._kinds = kinds
        self._examples = examples[:MAX_EXAMPLES]
        self._kv_policy = kv_policy
        full = self._replay([])
        self._full = full.run(self._examples)
        again = self._replay([], rows_per_launch=MAX_ROWS // 2).run(self._examples)
        self.noise_floor = 1 - again.agreement(self._full)

    def disagreement(self, boundaries: Sequence[Boundary]) -> float:
        """Share of all tokens that differ from full depth's at the thresholds of LEVEL, above the noise floor."""
        device, dtype = self._adapter.device, self._adapter.dtype
        ready = [copy.deepcopy(boundary).ready(device, dtype) for boundary in boundaries]
        thresholds = [boundary.thresholds[LEVEL] for boundary in ready]
        scorer = Scorer(ready, self._adapter.final_norm, self._adapter.head)
        exited = self._replay(ready).run(self._examples, gate_stops(scorer, thresholds))
        return max(0.0, 1 - exited.agreement(self._full) - self.noise_floor)

    def _replay(self, boundaries: Sequence[Boundary], rows_per_launch: int = MAX_ROWS) -> Replay:
        longest = max(len(example.token_ids) for example in self._examples)
        return Replay(
            self._adapter,
            boundaries,
            self._kinds,
            kv_policy=self._kv_policy,
            longest=longest,
            rows_per_launch=rows_per_launch,
        )


def gate_stops(scorer: Scorer, thresholds: Sequence[float]) -> Stops:
    """Generated rows stop where their gate's score reaches the boundary's threshold."""

    def stops(boundary: int, states: Tensor, rows: ReplayRows) -> np.ndarray:
        stopping = np.zeros(len(states), dtype=bool)
        asked = np.flatnonzero(rows.is_generated)
        if len(asked):
            scores = scorer.by_gate(boundary, states[torch.from_numpy(asked).to(states.device)])
            stopping[asked] = scores.cpu().numpy() >= thresholds[boundary]
        return stopping

    return stops


def expected_saving(boundaries: Sequence[Boundary], scores: Sequence[np.ndarray], num_layers: int) -> float:
    """Layers saved per token, as a share of all, when tokens leave at the first boundary whose score allows it.

    ``scores``: each boundary's gate scores of the same tokens.
    """
    remaining = np.ones(len(scores[0]), dtype=bool)
    saved = 0.0
    for boundary, score in zip(boundaries, scores, strict=True):
        stops = remaining & (score >= boundary.thresholds[LEVEL])
        saved += stops.mean() * (num_layers - boundary.depth) - remaining.mean() * BOUNDARY_COST
        remaining &= ~stops
    return float(saved / num_layers)
