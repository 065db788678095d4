"""Acceptance of drafts by ratio, and when a chain of drafts ends."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import pytest
import torch

from tide_ray import SamplingParams
from tide_ray.engine.sampler import SamplingRow
from tide_ray.engine.sequence import Draft, Proposal, Sequence
from tide_ray.engine.speculation import MAX_DRAFTS, Trial, must_run_deep, num_confirmed

PARAMS = SamplingParams(temperature=1.0, max_tokens=100)


def sequence(scores: Seq[float] = (), last: int = 7, **changes: object) -> Sequence:
    values = {"prompt_ids": [1], "params": PARAMS, "seed": 0, "stop_ids": frozenset({3}), "max_tokens": 100}
    made = Sequence(request_id="r", index=0, arrival_us=0, **{**values, **changes})  # type: ignore[arg-type]
    made.drafts = [Draft(7, score) for score in scores]
    if made.drafts:
        made.drafts[-1] = Draft(last, scores[-1])
    return made


@pytest.mark.parametrize("draws", [40_000])
def test_accepting_by_ratio_keeps_the_distribution_and_as_many_drafts_as_can_be(draws: int) -> None:
    p = torch.tensor([0.5, 0.2, 0.2, 0.1, 0.0])
    q = torch.tensor([0.1, 0.6, 0.0, 0.2, 0.1])
    drafts = torch.multinomial(q, draws, replacement=True, generator=torch.Generator().manual_seed(1))
    rows = [SamplingRow(PARAMS, seed, position=5, token_ids=()) for seed in range(draws)]
    proposals = [Proposal(float(q[draft]), q.log()) for draft in drafts]
    trial = Trial(list(range(draws)), drafts.tolist(), proposals, rows, head=lambda states: states)
    chosen = torch.full((draws,), -1)
    trial.settle(chosen, p.log().expand(draws, -1))
    shares = np.bincount(chosen.numpy(), minlength=5) / draws
    assert np.abs(shares - p.numpy()).max() < 0.012  # five standard deviations
    accepted = float((chosen == drafts).double().mean())
    assert accepted == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.012)


def test_drafts_that_cannot_be_told_apart_are_all_accepted() -> None:
    p = torch.tensor([0.5, 0.3, 0.2]).log().expand(500, -1)
    rows = [SamplingRow(PARAMS, seed, position=0, token_ids=()) for seed in range(500)]
    proposals = [Proposal(0.3, p[0])] * 500
    chosen = torch.zeros(500, dtype=torch.long)
    Trial(list(range(500)), [1] * 500, proposals, rows, head=lambda states: states).settle(chosen, p)
    assert (chosen == 1).float().mean() > 0.99  # but for rounding of 0.3


@pytest.mark.parametrize(
    ("made", "ends"),
    [
        (sequence(), False),
        (sequence([0.9, 0.9]), False),
        (sequence([0.7, 0.7]), True),
        (sequence([float("nan")] * (MAX_DRAFTS - 1)), False),
        (sequence([float("nan")] * MAX_DRAFTS), True),
        (sequence([0.9], last=3), True),
        (sequence([0.9], max_tokens=3), False),
        (sequence([0.9], max_tokens=2), True),
        (sequence(max_tokens=1), True),
    ],
)
def test_a_chain_ends_when_it_should(made: Sequence, ends: bool) -> None:
    assert must_run_deep(made) == ends


def test_drafts_count_up_to_the_first_that_is_wrong() -> None:
    drafts = [Draft(token, 1.0) for token in (4, 5, 6)]
    assert num_confirmed(drafts, [4, 5, 6, 9]) == 3
    assert num_confirmed(drafts, [4, 8, 6, 9]) == 1
    assert num_confirmed(drafts, [5, 5, 6, 9]) == 0
    assert num_confirmed([], [9]) == 0
