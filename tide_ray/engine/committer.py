"""Take a launch's tokens into their sequences: the third of the engine's three verbs (schedule, run, commit)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq

from tide_ray.engine.launch import SampledToken
from tide_ray.engine.scheduler import Scheduler
from tide_ray.engine.sequence import Draft, Sequence
from tide_ray.engine.speculation import num_confirmed
from tide_ray.types import EngineStats


class Committer:
    """Advances sequences, decides which are finished, and frees what the finished ones held.

    Args:
        full_depth: tokens of a lesser depth are drafts; None: every token counts as it comes.
        judged: told how many drafts were confirmed and how many were wrong (those behind a wrong one are neither).
    """

    def __init__(
        self,
        scheduler: Scheduler,
        stats: EngineStats,
        clock: Callable[[], int],
        *,
        full_depth: int | None = None,
        judged: Callable[[int, int], None] = lambda _right, _wrong: None,
    ) -> None:
        self.scheduler = scheduler
        self.stats = stats
        self.clock = clock
        self.full_depth = full_depth
        self.judged = judged

    def commit(self, sampled: Seq[SampledToken]) -> list[Sequence]:
        """Note the tokens of a launch; returns the sequences that this finished.

        A sequence may have ended since the launch was queued; its token is dropped.
        """
        time_us = self.clock()
        finished: list[Sequence] = []
        for sequence, tokens in itertools.groupby(sampled, key=lambda token: token.sequence):
            sequence.num_ahead -= 1
            if sequence.is_finished:
                self.stats.num_dropped_tokens += 1
                continue
            self._take(sequence, list(tokens), time_us)
            if sequence.is_finished:
                self.scheduler.remove(sequence)
                finished.append(sequence)
        self.stats.num_steps += 1
        self.stats.num_preemptions = self.scheduler.num_preemptions
        return finished

    def _take(self, sequence: Sequence, tokens: Seq[SampledToken], time_us: int) -> None:
        """Keep a draft; or note a token of full depth, before it the drafts that full depth chose as well."""
        if self.full_depth is not None and tokens[0].depth < self.full_depth:
            (token,) = tokens
            sequence.drafts.append(Draft(token.token_id, token.score, token.proposal))
            return
        drafts = list(sequence.drafts)
        num_right = num_confirmed(drafts, [token.token_id for token in tokens])
        if drafts:
            self.judged(num_right, int(num_right < len(drafts)))
            self.scheduler.take_back_drafts(sequence, num_right)
        scores = [*(draft.score for draft in drafts), tokens[-1].score]  # of the gates that asked each row
        num_noted = 0
        for token, score in zip(tokens[: num_right + 1], scores, strict=False):
            self._note(sequence, token, score, time_us)
            num_noted += 1
            if sequence.is_finished:
                break
        num_accepted = min(num_noted, num_right)
        sequence.num_accepted_drafts += num_accepted
        sequence.num_rejected_drafts += len(drafts) - num_accepted
        self.stats.num_accepted_drafts += num_accepted
        self.stats.num_rejected_drafts += len(drafts) - num_accepted

    def _note(self, sequence: Sequence, token: SampledToken, score: float, time_us: int) -> None:
        sequence.append(token.token_id, token.depth, token.logprobs, time_us, score)
        self.scheduler.token_chosen(sequence)
        self.stats.num_generated_tokens += 1
        if len(sequence.output_ids) == 1:
            self.stats.num_prompt_tokens += len(sequence.prompt_ids)
            self.stats.num_cached_tokens += sequence.num_cached_tokens
        at_depth = self.stats.tokens_at_depth
        at_depth[token.depth] = at_depth.get(token.depth, 0) + 1
        check_finished(sequence)


def check_finished(sequence: Sequence) -> None:
    """Set ``finish_reason`` if the newest token ends the sequence: EOS or stop id, stop string, then length."""
    token_id = sequence.output_ids[-1]
    may_stop = len(sequence.output_ids) > sequence.params.min_tokens
    if token_id in sequence.stop_ids and may_stop:
        sequence.finish_reason = "stop"
        sequence.stop_reason = token_id if token_id in sequence.params.stop_token_ids else None
    elif sequence.detokenizer is not None:
        sequence.detokenizer.append(token_id)
    is_last = sequence.is_finished or len(sequence.output_ids) >= sequence.max_tokens
    if sequence.detokenizer is not None:
        if is_last:  # what was held back may complete a stop string
            sequence.detokenizer.finish()
        if sequence.detokenizer.stop_string is not None and not sequence.is_finished:
            sequence.finish_reason, sequence.stop_reason = "stop", sequence.detokenizer.stop_string
    if is_last and not sequence.is_finished:
        sequence.finish_reason = "length"
