"""Take a launch's tokens into their sequences: the third of the engine's three verbs (schedule, run, commit)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from tide_ray.engine.launch import SampledToken
from tide_ray.engine.scheduler import Scheduler
from tide_ray.engine.sequence import Sequence
from tide_ray.types import EngineStats


class Committer:
    """Advances sequences, decides which are finished, and frees what the finished ones held."""

    def __init__(self, scheduler: Scheduler, stats: EngineStats, clock: Callable[[], int]) -> None:
        self.scheduler = scheduler
        self.stats = stats
        self.clock = clock

    def commit(self, sampled: Seq[SampledToken]) -> list[Sequence]:
        """Note the tokens of a launch; returns the sequences that this finished.

        A sequence may have ended since the launch was queued; its token is dropped.
        """
        time_us = self.clock()
        finished: list[Sequence] = []
        at_depth = self.stats.tokens_at_depth
        for token in sampled:
            sequence = token.sequence
            sequence.num_ahead -= 1
            if sequence.is_finished:
                self.stats.num_dropped_tokens += 1
                continue
            sequence.append(token.token_id, token.depth, token.logprobs, time_us, token.score)
            self.scheduler.token_chosen(sequence)
            self.stats.num_generated_tokens += 1
            if len(sequence.output_ids) == 1:
                self.stats.num_prompt_tokens += len(sequence.prompt_ids)
                self.stats.num_cached_tokens += sequence.num_cached_tokens
            at_depth[token.depth] = at_depth.get(token.depth, 0) + 1
            check_finished(sequence)
            if sequence.is_finished:
                self.scheduler.remove(sequence)
                finished.append(sequence)
        self.stats.num_steps += 1
        self.stats.num_preemptions = self.scheduler.num_preemptions
        return finished


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
