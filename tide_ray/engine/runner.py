"""Run scheduled rows through the model: the second of the engine's three verbs (schedule, run, commit)."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.rows import LaunchCache, RowSpan, build_rows
from tide_ray.engine.sampler import Sampler, SamplingRow
from tide_ray.engine.scheduler import ScheduledSpan
from tide_ray.engine.sequence import Sequence
from tide_ray.engine.stages import Stage
from tide_ray.models.adapter import Adapter
from tide_ray.types import EngineStats, Logprob


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token chosen for one sequence and the depth its state left the layers at."""

    sequence: Sequence
    token_id: int
    depth: int
    logprobs: dict[int, Logprob] | None


class Runner:
    """Owns the model, the K/V pools and the sampler."""

    def __init__(self, adapter: Adapter, stages: Seq[Stage], pools: KVCache, stats: EngineStats) -> None:
        self.adapter = adapter
        self.stages = stages
        self.pools = pools
        self.stats = stats
        self.sampler = Sampler()

    @torch.inference_mode()
    def run(self, spans: Seq[ScheduledSpan]) -> list[SampledToken]:
        """One launch of every stage over the spans' rows; a token for each span that reaches its sequence's end."""
        rows = build_rows([_row_span(span) for span in spans], self.pools.page_size, self.adapter.device)
        cache = LaunchCache(self.pools, rows)
        hidden, calls = self.adapter.prologue(rows.token_ids, rows.positions, cache)
        for stage in self.stages:
            hidden = stage.run(self.adapter, hidden, calls, cache, self.stats.rows_through_layer)
            self.stats.launches[stage.name] = self.stats.launches.get(stage.name, 0) + 1
        sampling, last_rows, row = [], [], 0
        for span in spans:
            row += span.count
            if span.samples:
                sampling.append(span.sequence)
                last_rows.append(row - 1)
        if not sampling:
            return []
        index = torch.tensor(last_rows, device=hidden.device)
        logits = self.adapter.head(self.adapter.final_norm(hidden[:, index]))
        sampled = self.sampler.sample(logits, [sampling_row(sequence) for sequence in sampling])
        depth = self.stages[-1].depth
        return [
            SampledToken(sequence, token_id, depth, logprobs)
            for sequence, token_id, logprobs in zip(sampling, sampled.token_ids, sampled.logprobs, strict=True)
        ]


def _row_span(span: ScheduledSpan) -> RowSpan:
    sequence = span.sequence
    return RowSpan(
        token_ids=sequence.tokens(sequence.num_computed, span.count),
        start=sequence.num_computed,
        pages=sequence.page_array(),
        is_decode=span.is_decode,
    )


def sampling_row(sequence: Sequence) -> SamplingRow:
    """What the sampler must know to choose the sequence's next token."""
    position = len(sequence.output_ids)
    params = sequence.params
    needs_history = params.repetition_penalty != 1.0
    return SamplingRow(
        params=params,
        seed=sequence.seed,
        position=position,
        token_ids=sequence.prompt_ids + sequence.output_ids if needs_history else (),
        suppressed=tuple(sequence.stop_ids) if position < params.min_tokens else (),
    )
