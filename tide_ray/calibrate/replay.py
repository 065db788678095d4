"""Whole sequences with exits in place: what full depth and an exiting engine would choose after the same tokens.

Teacher-forced: the tokens are given, so a layer can run all rows of a sequence at once, and every row attends to K/V of
the rows before it as exits left them. The choices are those of the engine that follows the same tokens one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.trace import MAX_ROWS, batches
from tide_ray.engine.draws import argmax
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.kv_fill import KVFill
from tide_ray.engine.rows import LaunchCache, RowBatch, RowSpan, attends_by_row, build_rows
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.readouts import unit_rms
from tide_ray.exits.rotary import Rotary
from tide_ray.models.adapter import Adapter
from tide_ray.models.layer_calls import LayerCall

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
    """Of every judged row: the token chosen, the depth it left at, whether its row is of the answer, its sequence.

    ``all_depths``: of all rows, prompts included.
    """

    choices: np.ndarray
    depths: np.ndarray
    is_generated: np.ndarray
    sequences: np.ndarray
    all_depths: np.ndarray

    def agreement(self, other: Replayed) -> float:
        """Share of rows with the same choice."""
        return float((self.choices == other.choices).mean())

    def disagreements(self, other: Replayed) -> np.ndarray:
        """Share of each sequence's judged rows with another choice, ``[sequences]``."""
        counts = np.bincount(self.sequences)
        shares: np.ndarray = np.bincount(self.sequences, weights=self.choices != other.choices) / counts
        return shares


@dataclass(slots=True)
class _Flow:
    """A launch at a boundary: all its rows, who is left, and what became of the others.

    ``left``: numbers of the rows that still run, ``[n]``; ``spans``: those rows; ``choices`` (-1: none yet) and
    ``depths``: of all rows.
    """

    rows: ReplayRows
    left: np.ndarray
    spans: list[RowSpan]
    choices: np.ndarray
    depths: np.ndarray
    hidden: Tensor  # [1, n, D]
    states: Tensor  # unit-rms [n, D]
    launch: RowBatch
    calls: list[LayerCall]

    @property
    def is_judged(self) -> np.ndarray:
        judged: np.ndarray = self.rows.positions >= self.rows.first_judged
        return judged


class Replay:
    """Replays sequences through the model.

    Args:
        boundaries: ready for inference, shallowest first.
        kinds: how layers rotate K; None where that is not known, for ``copy`` and ``deferred``.
        kv_policy: ``fitted``, ``copy``, or ``deferred``, where later rows attend to exact K/V of generated ones.
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
        self._cuts = [0, *(boundary.depth for boundary in boundaries), adapter.num_layers]
        self._pools = KVCache(
            adapter.kv_shapes,
            num_pages=2 * max(longest, rows_per_launch) // PAGE_SIZE + 2,  # pages of short sequences are half empty
            page_size=PAGE_SIZE,
            dtype=adapter.dtype,
            device=adapter.device,
        )
        self._fill = KVFill(adapter, self._pools, boundaries, kinds if kv_policy != "copy" else None)

    def run(self, examples: Sequence[Example], stops: Stops = nothing_stops) -> Replayed:
        """The judged rows of all examples, in order."""
        return self.run_all(examples, [stops])[0]

    def run_all(
        self, examples: Sequence[Example], variants: Sequence[Stops], progress: Callable[[float], None] | None = None
    ) -> list[Replayed]:
        """As ``run`` for each of ``variants``, in the same launches; what they have in common runs once.

        ``progress`` gets the share of the sequences that are done.
        """
        parts: list[list[Replayed]] = [[] for _ in variants]
        first_sequence = first_row = 0
        for batch in self._batches(examples):
            for part, replayed in zip(parts, self._launch(batch, first_sequence, first_row, variants), strict=True):
                part.append(replayed)
            first_sequence += len(batch)
            first_row += sum(len(example.token_ids) for example in batch)
            if progress is not None:
                progress(first_sequence / len(examples))
        return [
            Replayed(*(np.concatenate([getattr(p, name) for p in part]) for name in Replayed.__slots__))
            for part in parts
        ]

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
    def _launch(
        self, batch: Sequence[Example], first_sequence: int, first_row: int, variants: Sequence[Stops]
    ) -> list[Replayed]:
        rows, spans = _rows(batch, first_sequence, first_row), self._spans(batch)
        num_rows = len(rows.positions)
        nothing, full = np.full(num_rows, -1), np.full(num_rows, self._adapter.num_layers)
        flow = self._run_stage(rows, np.arange(num_rows), spans, nothing, full, None, 0)
        results: dict[int, Replayed] = {}
        self._part(flow, 0, dict(enumerate(variants)), results)
        return [results[number] for number in range(len(variants))]

    def _run_stage(
        self,
        rows: ReplayRows,
        left: np.ndarray,
        spans: list[RowSpan],
        choices: np.ndarray,
        depths: np.ndarray,
        hidden: Tensor | None,
        stage: int,
    ) -> _Flow:
        """Run the rows ``left`` through a stage. ``hidden``: their states before it; None: the embeddings."""
        adapter = self._adapter
        launch = build_rows(spans, PAGE_SIZE, adapter.device, by_row=attends_by_row(adapter.device, adapter.dtype))
        cache = LaunchCache(self._pools, launch)
        embedded, calls = adapter.prologue(launch.token_ids, launch.positions, cache)
        hidden = embedded if hidden is None else hidden
        for layer in range(self._cuts[stage], self._cuts[stage + 1]):
            hidden = adapter.run_layer(layer, hidden, calls[layer], cache)
        return _Flow(rows, left, spans, choices, depths, hidden, unit_rms(hidden[0]), launch, calls)

    def _part(self, flow: _Flow, number: int, variants: dict[int, Stops], results: dict[int, Replayed]) -> None:
        """Take a launch on from boundary ``number``: variants that stop the same rows there go on together.

        One after the other, each to its end: what an earlier one left in the pages of deeper layers is replaced.
        """
        if number == len(self._boundaries):
            ended = self._ended(flow)
            results |= dict.fromkeys(variants, ended)
            return
        groups: dict[bytes, tuple[np.ndarray, dict[int, Stops]]] = {}
        for variant, stops in variants.items():
            stopping = stops(number, flow.states, flow.rows.take(flow.left)) & (flow.choices[flow.left] < 0)
            groups.setdefault(stopping.tobytes(), (stopping, {}))[1][variant] = stops
        for stopping, members in groups.values():
            choices, depths, kept = self._stop(flow, number, stopping)
            left = flow.left[kept]
            if not len(left):
                ended = self._ended(replace(flow, left=left, choices=choices, depths=depths))
                results |= dict.fromkeys(members, ended)
                continue
            hidden = flow.hidden if kept.all() else flow.hidden[:, torch.from_numpy(kept).to(flow.hidden.device)]
            spans = _selected(flow.spans, kept)
            onward = self._run_stage(flow.rows, left, spans, choices, depths, hidden, number + 1)
            self._part(onward, number + 1, members, results)

    def _stop(self, flow: _Flow, number: int, stopping: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Let rows choose and leave: choices and depths of all rows, and which of those left go on (bool ``[n]``)."""
        boundary, states = self._boundaries[number], flow.states
        choices, depths = flow.choices.copy(), flow.depths.copy()
        depths[flow.left[stopping]] = boundary.depth
        chooses = np.flatnonzero(stopping & flow.is_judged[flow.left])
        choices[flow.left[chooses]] = self._choices(boundary.head(states[torch.from_numpy(chooses).to(states.device)]))
        leaves = stopping
        if self._kv_policy == "deferred":  # generated rows go on for their K/V
            leaves = stopping & flow.rows.take(flow.left).is_prompt
        if leaves.any():
            index = torch.from_numpy(np.flatnonzero(leaves)).to(states.device)
            if self._kv_policy == "copy":
                self._fill.copied(number, flow.hidden[0, index], flow.launch, index)
            else:
                self._fill.fitted(number, states[index], flow.launch, index, flow.calls)
        return choices, depths, ~leaves

    def _ended(self, flow: _Flow) -> Replayed:
        judged, choices = flow.is_judged, flow.choices.copy()
        chooses = np.flatnonzero(judged[flow.left] & (choices[flow.left] < 0))
        if len(chooses):
            choices[flow.left[chooses]] = self._choices(
                flow.hidden[0, torch.from_numpy(chooses).to(flow.hidden.device)]
            )
        rows = flow.rows
        return Replayed(
            choices[judged], flow.depths[judged], rows.is_generated[judged], rows.sequences[judged], flow.depths
        )

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
