"""Teacher forcing through the engine: what it would choose after another's tokens, K/V of exits in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tide_ray.engine.choice import Choice
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.sampler import Sampler, SamplingRow, Settle
from tide_ray.types import RequestOutput, SamplingParams, UserError


class FollowingSampler(Sampler):
    """Chooses as always and notes the choice, but answers with the token to follow; requests are told by their seed.

    ``same``: by request, for each token whether it would have been chosen; ``logprobs``: where they are asked for, each
    token's log probability.
    """

    def __init__(self, answers: Sequence[Sequence[int]], *, with_logprobs: bool = False) -> None:
        self.answers = answers
        self.same: list[list[bool]] = [[] for _ in answers]
        self.logprobs: list[list[float]] = [[] for _ in answers]
        self._with_logprobs = with_logprobs

    def choose(self, logits: torch.Tensor, rows: Sequence[SamplingRow], settle: Settle | None = None) -> Choice:
        chosen = super().choose(logits, rows, settle).read().token_ids
        wanted = [self.answers[row.seed][row.position] for row in rows]
        for row, own, given in zip(rows, chosen, wanted, strict=True):
            self.same[row.seed].append(own == given)
        tokens = torch.tensor(wanted, device=logits.device)
        if self._with_logprobs:
            given_logits = logits.float().gather(1, tokens[:, None])[:, 0]
            for row, value in zip(rows, (given_logits - logits.float().logsumexp(-1)).tolist(), strict=True):
                self.logprobs[row.seed].append(value)
        return Choice(tokens, logits, [None] * len(rows))


def answer(engine: TideEngine, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The engine's own greedy answers. Raises UserError when it rejects a prompt."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return [output.outputs[0].token_ids for output in _generate(engine, prompts, [params] * len(prompts))]


def follow(engine: TideEngine, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[list[bool]]:
    """For every token of ``answers``, whether ``engine`` would have chosen it after the tokens before it.

    Raises:
        UserError: the engine rejects a prompt.
    """
    return _followed(engine, prompts, FollowingSampler(answers)).same


def follow_text(engine: TideEngine, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log probabilities of every text's tokens from the second on, each run as an answer's tokens are.

    None of them but the last may be one that ends an answer.

    Raises:
        UserError: the engine rejects a text.
    """
    sampler = FollowingSampler([text[1:] for text in texts], with_logprobs=True)
    return _followed(engine, [text[:1] for text in texts], sampler).logprobs


def _followed(engine: TideEngine, prompts: Sequence[Sequence[int]], sampler: FollowingSampler) -> FollowingSampler:
    engine.runner.sampler = sampler
    try:
        # Only the last token of an answer may be one that ends it.
        params = [SamplingParams(temperature=0, max_tokens=len(one), seed=n) for n, one in enumerate(sampler.answers)]
        _generate(engine, prompts, params)
    finally:
        engine.runner.sampler = Sampler()
    return sampler


def _generate(
    engine: TideEngine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    outputs = engine.generate(list(prompts), params)
    for output in outputs:
        if output.error:
            raise UserError(output.error)
    return outputs
