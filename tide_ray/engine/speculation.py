"""Self-speculation: tokens chosen at a boundary are drafts until full depth confirms them (mode ``verified``).

A sequence drafts as long as its gates say so. The positions that the drafts come from are pending; when the newest one
goes deep they go with it, over exact K/V, and full depth chooses at each of them. Drafts count up to the first that it
does not choose; its choice stands there instead, and what follows is rolled back.

What full depth chooses: for a greedy request the likeliest token; for a sampled one with a seed what it would draw with
that seed at that place, so that the answer is the one that full depth gives with this seed, whatever was drafted
(drafter-invariant: Daliri, Musco and Suresh, arXiv 2408.07978). Without a seed a draft x is accepted with probability
min(1, p(x) / q(x)), and else a token drawn from max(0, p - q) normalised, which leaves p as it is and accepts as many
as can be (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tide_ray.engine.draws import draw, uniform
from tide_ray.engine.sampler import SamplingRow, processed_probabilities
from tide_ray.engine.sequence import Draft, Proposal, Sequence
from tide_ray.engine.transfers import upload, upload_one

MAX_DRAFTS = 8
"""Longest chain of drafts."""

LEAST_CHAIN_SCORE = 0.5
"""A chain ends where it is more likely than not that one of its drafts is wrong, as its gates have it."""

_ACCEPT, _REDRAW = 0x5DEECE66D, 0x2545F4914F6CDD1D
"""Set apart, from the draws of tokens, the random numbers that decide on drafts and that replace them."""


def must_run_deep(sequence: Sequence) -> bool:
    """Whether its chain of drafts ends here: the newest token is to run every layer, and the drafts with it.

    A chain ends at ``MAX_DRAFTS``, where the product of its scores is low, before the last token that the answer may
    have, and after a draft that would end it.
    """
    drafts = sequence.drafts
    if len(sequence.output_ids) + len(drafts) + 1 >= sequence.max_tokens:
        return True
    if not drafts:
        return False
    if len(drafts) >= MAX_DRAFTS or drafts[-1].token_id in sequence.stop_ids:
        return True
    return math.prod(draft.score for draft in drafts if not math.isnan(draft.score)) < LEAST_CHAIN_SCORE


def accepts_by_ratio(sequence: Sequence) -> bool:
    """Whether its drafts are accepted with min(1, p/q); else where full depth would have chosen them."""
    return not sequence.params.is_greedy and sequence.params.seed is None


def num_confirmed(drafts: Seq[Draft], choices: Seq[int]) -> int:
    """How many drafts are what full depth chose, one after another from the first on."""
    for number, (draft, choice) in enumerate(zip(drafts, choices, strict=False)):
        if draft.token_id != choice:
            return number
    return min(len(drafts), len(choices))


@dataclass(frozen=True, slots=True)
class Trial:
    """Drafts to accept by ratio: ``proposals`` of ``token_ids`` at rows ``index`` of a step, of which ``rows`` tell.

    ``head``: from the states ``[n, D]`` of proposals to logits ``[n, V]``.
    """

    index: list[int]
    token_ids: list[int]
    proposals: list[Proposal]
    rows: list[SamplingRow]
    head: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls,
        sequences: Seq[Sequence],
        num_drafts: Seq[int],
        rows: Seq[SamplingRow],
        head: Callable[[Tensor], Tensor],
    ) -> Trial | None:
        """What is to be accepted of a step, each row of which follows the first ``num_drafts`` of its sequence."""
        trial = cls([], [], [], [], head)
        for place, (sequence, number) in enumerate(zip(sequences, num_drafts, strict=True)):
            draft = sequence.drafts[number] if number < len(sequence.drafts) else None
            if draft is not None and draft.proposal is not None:
                trial.index.append(place)
                trial.token_ids.append(draft.token_id)
                trial.proposals.append(draft.proposal)
                trial.rows.append(rows[place])
        return trial if trial.index else None

    def settle(self, chosen: Tensor, logits: Tensor) -> None:
        """Put into ``chosen`` (long ``[R]``) the drafts that are accepted, and what replaces the others."""
        index, tokens = upload([np.array(self.index), np.array(self.token_ids)], logits.device)
        full = processed_probabilities(logits[index], self.rows)
        wanted = full.gather(1, tokens[:, None])[:, 0].cpu().numpy()
        proposed = np.array([proposal.probability for proposal in self.proposals])
        rejected = np.flatnonzero(self._uniform(_ACCEPT) * proposed >= wanted)
        chosen[index] = tokens
        if not len(rejected):
            return
        at, uniforms = upload([rejected, self._uniform(_REDRAW)[rejected]], logits.device)
        states = torch.stack([self.proposals[n].state for n in rejected])
        drafted = processed_probabilities(self.head(states), [self.rows[n] for n in rejected])
        rest = (full[at] - drafted).clamp_min_(0.0)
        # Rounding may leave nothing where p and q are alike; then p is as good.
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, full[at])
        chosen[index[at]] = draw(rest, uniforms)

    def _uniform(self, purpose: int) -> np.ndarray:
        return uniform([row.seed ^ purpose for row in self.rows], [row.position for row in self.rows])


def proposals(
    sequences: Seq[Sequence],
    is_draft: Seq[bool],
    rows: Seq[SamplingRow],
    states: Tensor,
    logits: Tensor,
    tokens: Tensor,
) -> dict[int, Proposal]:
    """By row, how the drafts of a step were drawn that are to be accepted by ratio.

    states: ``[R, D]``; logits: ``[R, V]``; tokens: long ``[R]``, what was drawn.
    """
    places = [n for n, sequence in enumerate(sequences) if is_draft[n] and accepts_by_ratio(sequence)]
    if not places:
        return {}
    index = upload_one(np.array(places), logits.device)
    drafted = processed_probabilities(logits[index], [rows[n] for n in places])
    probabilities = drafted.gather(1, tokens[index][:, None])[:, 0].tolist()
    return {n: Proposal(value, states[n].clone()) for n, value in zip(places, probabilities, strict=True)}
