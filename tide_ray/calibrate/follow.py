"""Teacher forcing through the engine: what it would choose after another's tokens, K/V of exits in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tide_ray.engine.choice import Choice
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.sampler import Sampler, SamplingRow
from tide_ray.types import RequestOutput, SamplingParams, UserError

BOOTSTRAPS = 1000


class FollowingSampler(Sampler):
    """Chooses as always and notes the choice, but answers with the token to follow; requests are told by their seed."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.answers = answers
        self.same: list[list[bool]] = [[] for _ in answers]

    def choose(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Choice:
        chosen = super().choose(logits, rows).read().token_ids
        wanted = [self.answers[row.seed][row.position] for row in rows]
        for row, own, given in zip(rows, chosen, wanted, strict=True):
            self.same[row.seed].append(own == given)
        return Choice(torch.tensor(wanted, device=logits.device), logits, [None] * len(rows))


def answer(engine: TideEngine, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The engine's own greedy answers. Raises UserError when it rejects a prompt."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [output.outputs[0].token_ids for output in _generate(engine, prompts, [params] * len(prompts))]


def follow(engine: TideEngine, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[bool]]:
    """For every token of ``answers``, whether ``engine`` would have chosen it after the tokens before it.

    Raises:
        UserError: the engine rejects a prompt.
    """
    sampler = FollowingSampler(answers)
    engine.runner.sampler = sampler
    try:
        # Only the last token of an answer may be one that ends it.
        params = [SamplingParams(temperature=0, max_tokens=len(one), seed=n) for n, one in enumerate(answers)]
        _generate(engine, prompts, params)
    finally:
        engine.runner.sampler = Sampler()
    return sampler.same


def _generate(
    engine: TideEngine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    outputs = engine.generate(list(prompts), params)
    for output in outputs:
        if output.error:
            raise UserError(output.error)
    return outputs


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Weighted mean over prompts, with a 95 % interval by resampling them (bootstrap): ``[mean, low, high]``."""
    given = np.asarray(values, dtype=float)
    shares = np.ones(len(given)) if weights is None else np.asarray(weights, dtype=float)
    draws = np.random.default_rng(0).integers(0, len(given), (BOOTSTRAPS, len(given)))
    means = (given * shares)[draws].sum(1) / shares[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return [round(float(v), 5) for v in (np.average(given, weights=shares), low, high)]
