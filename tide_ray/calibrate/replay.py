"""Whole sequences with exits in place: what full depth and an exiting engine would choose after the same tokens.

Teacher-forced: the tokens are given, so a layer can run all rows of a sequence at once, and every row attends to K/V of
the rows before it as exits left them. The choices are those of the engine that follows the same tokens one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.trace import MAX_ROWS, batches
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.kv_fill import KVFill
from tide_ray.engine.rows import LaunchCache, RowSpan, attends_by_row, build_rows
from tide_ray.engine.sampler import argmax
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.readouts import unit_rms
from tide_ray.exits.rotary import Rotary
from tide_ray.models.adapter import Adapter

PAGE_SIZE = 32
CHUNK = 512


@dataclass(frozen=True, slots=True)
class ReplayRows:
    """Rows of a replay, N of them: int ``[N]`` each. ``first_judged`` and ``sequences`` as in TraceRows;
    ``row_numbers``: of all rows of the replay, in the order of the examples."""

    positions: np.ndarray
    first_judged: np.ndarray
    sequences: np.ndarray
    row_numbers: np.ndarray

    @property
    def is_prompt(self) -> np.ndarray:
        """Rows that choose no token. The row that chooses an answer's first token is none of them."""
        return self.positions < self.first_judged

    @property
    def is_generated(self) -> np.ndarray:
        """Rows that the engine would ask: those of the answer; of a text, all but its first."""
        return self.positions > self.first_judged

    def take(self, index: np.ndarray) -> ReplayRows:
        return ReplayRows(*(getattr(self, name)[index] for name in ReplayRows.__slots__))


Stops = Callable[[int, Tensor, ReplayRows], np.ndarray]
"""Boundary number, unit-rms states ``[N, D]`` and their rows -> which of them stop, bool ``[N]``."""


def nothing_stops(_boundary: int, _states: Tensor, rows: ReplayRows) -> np.ndarray:
    """Full depth."""
    return np.zeros(len(rows.positions), dtype=bool)


@dataclass(frozen=True, slots=True)
class Replayed:
    """Of every judged row: the token chosen, the depth it left at, whether its row is of the answer, its sequence."""

    choices: np.ndarray
    depths: np.ndarray
    is_generated: np.ndarray
    sequences: np.ndarray

    def agreement(self, other: Replayed) -> float:
        """Share of rows with the same choice."""
        return float((self.choices == other.choices).mean())


class Replay:
    """Replays sequences through the model.

    Args:
        boundaries: ready for inference, shallowest first.
        kinds: how layers rotate K; None where that is not known, for ``copy`` and ``deferred``.
        kv_policy: ``fitted``, ``copy``, or ``deferred``, where later rows attend to exact K/V.
    """

    def __init__(
        self,
        adapter: Adapter,
        boundaries: Sequence[Boundary],
        kinds: Sequence[Rotary] | None,
        *,
        kv_policy: str = "fitted",
        longest: int = MAX_ROWS,
        rows_per_launch: int = MAX_ROWS,
    ) -> None:
        self._adapter = adapter
        self._boundaries = boundaries
        self._kv_policy = kv_policy
        self._rows_per_launch = rows_per_launch
        self._pools = KVCache(
            adapter.kv_shapes,
            num_pages=2 * max(longest, rows_per_launch) // PAGE_SIZE + 2,  # pages of short sequences are half empty
            page_size=PAGE_SIZE,
            dtype=adapter.dtype,
            device=adapter.device,
        )
        self._fill = KVFill(adapter, self._pools, boundaries, kinds if kv_policy == "fitted" else None)

    def run(self, examples: Sequence[Example], stops: Stops = nothing_stops) -> Replayed:
        """The judged rows of all examples, in order."""
        parts = []
        first_sequence = first_row = 0
        for batch in self._batches(examples):
            parts.append(self._launch(batch, first_sequence, first_row, stops))
            first_sequence += len(batch)
            first_row += sum(len(example.token_ids) for example in batch)
        return Replayed(*(np.concatenate([getattr(p, name) for p in parts]) for name in Replayed.__slots__))

    def _batches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        limit = self._pools.num_pages
        for batch in batches(examples, self._rows_per_launch):
            while batch:
                pages = np.cumsum([self._num_pages(example) for example in batch])
                count = max(1, int((pages <= limit).sum()))
                yield batch[:count]
                batch = batch[count:]

    def _num_pages(self, example: Example) -> int:
        return -(-len(example.token_ids) // PAGE_SIZE)

    @torch.inference_mode()
    def _launch(self, batch: Sequence[Example], first_sequence: int, first_row: int, stops: Stops) -> Replayed:
        adapter = self._adapter
        rows = _rows(batch, first_sequence, first_row)
        spans = self._spans(batch)
        choices = np.full(len(rows.positions), -1)
        depths = np.full(len(rows.positions), adapter.num_layers)
        is_judged = rows.positions >= rows.first_judged
        left = np.arange(len(rows.positions))  # rows that are still in the launch
        hidden: Tensor | None = None
        cuts = [0, *(boundary.depth for boundary in self._boundaries), adapter.num_layers]
        for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
            launch = build_rows(spans, PAGE_SIZE, adapter.device, by_row=attends_by_row(adapter.device, adapter.dtype))
            cache = LaunchCache(self._pools, launch)
            embedded, calls = adapter.prologue(launch.token_ids, launch.positions, cache)
            hidden = embedded if hidden is None else hidden
            for layer in range(begin, end):
                hidden = adapter.run_layer(layer, hidden, calls[layer], cache)
            if end == adapter.num_layers:
                break
            states = unit_rms(hidden[0])
            stopping = stops(number, states, rows.take(left)) & (choices[left] < 0)
            index = torch.from_numpy(np.flatnonzero(stopping)).to(adapter.device)
            boundary = self._boundaries[number]
            depths[left[stopping]] = boundary.depth
            chooses = np.flatnonzero(stopping & is_judged[left])
            choices[left[chooses]] = self._choices(boundary.head(states[torch.from_numpy(chooses).to(states.device)]))
            if self._kv_policy == "deferred" or not stopping.any():
                continue
            if self._kv_policy == "copy":
                self._fill.copied(number, hidden[0, index], launch, index)
            else:
                self._fill.fitted(number, states[index], launch, index, calls)
            hidden = hidden[:, torch.from_numpy(~stopping).to(adapter.device)]
            spans = _selected(spans, ~stopping)
            left = left[~stopping]
            if not len(left):
                break
        if len(left) and hidden is not None:
            chooses = np.flatnonzero(is_judged[left] & (choices[left] < 0))
            choices[left[chooses]] = self._choices(hidden[0, torch.from_numpy(chooses).to(adapter.device)])
        return Replayed(choices[is_judged], depths[is_judged], rows.is_generated[is_judged], rows.sequences[is_judged])

    def _choices(self, states: Tensor) -> np.ndarray:
        adapter = self._adapter
        parts = [argmax(adapter.head(adapter.final_norm(part[None]))).cpu() for part in states.split(CHUNK)]
        return torch.cat(parts).flatten().numpy()

    def _spans(self, batch: Sequence[Example]) -> list[RowSpan]:
        spans, page = [], 0
        for example in batch:
            count = self._num_pages(example)
            pages = np.arange(page, page + count, dtype=np.int32)
            spans.append(RowSpan.run(example.token_ids, 0, pages, is_decode=False))
            page += count
        return spans


def _rows(batch: Sequence[Example], first_sequence: int, first_row: int) -> ReplayRows:
    lengths = [len(example.token_ids) for example in batch]
    return ReplayRows(
        positions=np.concatenate([np.arange(length) for length in lengths]),
        first_judged=np.repeat([example.first_judged for example in batch], lengths),
        sequences=np.repeat(np.arange(first_sequence, first_sequence + len(batch)), lengths),
        row_numbers=np.arange(first_row, first_row + sum(lengths)),
    )


def _selected(spans: Sequence[RowSpan], kept: np.ndarray) -> list[RowSpan]:
    ends = np.cumsum([len(span.token_ids) for span in spans])
    parts = [span.select(kept[end - len(span.token_ids) : end]) for span, end in zip(spans, ends, strict=True)]
    return [span for span in parts if len(span.token_ids)]
