"""The model over whole sequences at full depth, with what calibration needs of every row. Nothing is kept here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.corpus import Example
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.rows import Chunk, LaunchCache, RowBatch, RowSpan, build_rows
from tide_ray.exits.readouts import unit_rms
from tide_ray.exits.rotary import Rotary, rotary_tables
from tide_ray.models.adapter import Adapter
from tide_ray.models.layer_calls import LayerCall
from tide_ray.models.row_cache import attention_scale

MAX_ROWS = 1024


@dataclass(slots=True)
class TraceRows:
    """Rows of whole sequences, N in all.

    ``states``: unit-rms state at each depth asked for, ``[N, D]``; ``final``: the pre-norm state after the last layer,
    ``[N, D]``; ``keys_values``: K (unrotated) and V of the layers from the shallowest depth on, flat in the
    column order of ``KVHead``, ``[N, W]`` float32, or None; ``cosines``: each depth's cosine with the final state;
    ``attention``: by layer from the shallowest depth on, what a row gets of the attention of its sequence's judged
    rows, ``[N, layers]`` (mean over them and heads, 1 where attention is uniform), or None;
    ``is_judged``: bool ``[N]``, rows whose next token counts; ``positions``, ``first_judged`` and ``lengths`` (both of
    the row's sequence): int ``[N]``; ``sequences``: number of the row's sequence, over the whole trace.
    """

    states: dict[int, Tensor]
    final: Tensor
    keys_values: Tensor | None
    attention: Tensor | None
    cosines: dict[int, Tensor]
    is_judged: np.ndarray
    positions: np.ndarray
    first_judged: np.ndarray
    lengths: np.ndarray
    sequences: np.ndarray

    @property
    def keys(self) -> np.ndarray:
        """An integer for each row that no other row of its split has, ``[N]``."""
        return self.sequences << 32 | self.positions


class _RecordingCache(LaunchCache):
    """Attends within the launch's whole sequences and keeps K/V, unrotated, instead of writing them to pages.

    Args:
        first_judged: of every sequence; None: attention is not recorded.
    """

    def __init__(
        self,
        pools: KVCache,
        rows: RowBatch,
        kinds: Sequence[Rotary] | None,
        first_layer: int,
        first_judged: Sequence[int] | None,
    ) -> None:
        super().__init__(pools, rows)
        self.calls: list[LayerCall] = []
        self.columns: list[Tensor] = []
        self.attention: list[Tensor] = []
        self._kinds = kinds
        self._first_layer = first_layer
        self._first_judged = first_judged

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._kinds is not None and layer_idx >= self._first_layer:
            key = key_states[0].transpose(0, 1).float()
            tables = rotary_tables(self.calls[layer_idx])
            if tables is not None:
                key = self._kinds[layer_idx].unrotate(key, tables[0].float(), tables[1].float())
            self.columns += [key.flatten(1), value_states[0].transpose(0, 1).flatten(1).float()]
        self._layer = layer_idx
        return key_states, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, window: int
    ) -> Tensor:
        if self._first_judged is not None and self._layer >= self._first_layer:
            scale = attention_scale(query, scale)
            firsts = iter(self._first_judged)
            received = [
                _received(q, k, chunk, next(firsts), scale=scale, softcap=softcap, window=window)
                for chunk in self._rows.chunks
                for q, k in zip(chunk.sequences(query[0]), chunk.sequences(key[0]), strict=True)
            ]
            self.attention.append(torch.cat(received))
        return super().attend(query, key, value, scale=scale, softcap=softcap, window=window)


def _received(
    query: Tensor, key: Tensor, chunk: Chunk, first: int, *, scale: float, softcap: float, window: int
) -> Tensor:
    """Attention that a sequence's rows get from its rows ``first`` on, ``[rows]``; see TraceRows.

    query: ``[H, rows, d]``, key: ``[H_kv, rows, d]``, of one of the chunk's sequences.
    """
    asking = query[:, first:].float()
    asked = key.float().repeat_interleave(len(query) // len(key), 0)
    scores = asking @ asked.transpose(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~chunk.mask(window if window < chunk.length else 0)[first:], float("-inf"))
    return scores.softmax(-1).mean((0, 1)) * chunk.length


class Tracer:
    """Runs sequences through the model in launches of at most ``MAX_ROWS`` rows.

    Args:
        kinds: how layers rotate K; None: K/V are not recorded.
        depths: where states are recorded, rising.
    """

    def __init__(self, adapter: Adapter, pools: KVCache, kinds: Sequence[Rotary] | None, depths: Sequence[int]) -> None:
        self._adapter = adapter
        self._pools = pools
        self._kinds = kinds
        self._depths = list(depths)

    def trace(
        self,
        examples: Sequence[Example],
        *,
        first: int = 0,
        with_keys_values: bool = True,
        with_attention: bool = False,
    ) -> Iterator[TraceRows]:
        """Rows in launches; sequences are never divided, and numbered from ``first`` on."""
        for batch in batches(examples, MAX_ROWS):
            yield self._launch(batch, first, with_keys_values, with_attention)
            first += len(batch)

    @torch.inference_mode()
    def _launch(self, batch: Sequence[Example], first: int, with_keys_values: bool, with_attention: bool) -> TraceRows:
        adapter = self._adapter
        spans = [self._span(example) for example in batch]
        rows = build_rows(spans, self._pools.page_size, adapter.device)  # not by row: K/V are in no pages
        kinds = self._kinds if with_keys_values else None
        judged_from = [example.first_judged for example in batch] if with_attention else None
        cache = _RecordingCache(self._pools, rows, kinds, self._depths[0], judged_from)
        hidden, cache.calls = adapter.prologue(rows.token_ids, rows.positions, cache)
        raw: dict[int, Tensor] = {}
        for layer in range(adapter.num_layers):
            if layer in self._depths:
                raw[layer] = hidden[0]
            hidden = adapter.run_layer(layer, hidden, cache.calls[layer], cache)
        final = hidden[0]
        lengths = [len(example.token_ids) for example in batch]
        positions = np.concatenate([np.arange(length) for length in lengths])
        first_judged = np.repeat([example.first_judged for example in batch], lengths)
        return TraceRows(
            states={depth: unit_rms(state) for depth, state in raw.items()},
            final=final,
            keys_values=torch.cat(cache.columns, dim=1) if cache.columns else None,
            attention=torch.stack(cache.attention, dim=1) if cache.attention else None,
            cosines={d: torch.cosine_similarity(s.float(), final.float(), dim=-1) for d, s in raw.items()},
            is_judged=positions >= first_judged,
            positions=positions,
            first_judged=first_judged,
            lengths=np.repeat(lengths, lengths),
            sequences=np.repeat(np.arange(first, first + len(batch)), lengths),
        )

    def _span(self, example: Example) -> RowSpan:
        pages = np.zeros(-(-len(example.token_ids) // self._pools.page_size), dtype=np.int32)
        return RowSpan.run(example.token_ids, 0, pages, is_decode=False)


def batches(examples: Iterable[Example], max_rows: int) -> Iterator[list[Example]]:
    """Neighbouring examples that have at most ``max_rows`` rows together (or are a single longer one)."""
    batch: list[Example] = []
    rows = 0
    for example in examples:
        if batch and rows + len(example.token_ids) > max_rows:
            yield batch
            batch, rows = [], 0
        batch.append(example)
        rows += len(example.token_ids)
    if batch:
        yield batch
