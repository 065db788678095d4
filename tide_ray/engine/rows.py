"""The rows of one launch and how they attend: packed, ragged, no padding.

Rows come in two groups: first the decode rows (one per sequence), then several rows of one sequence each: a prompt,
what is left of one after exits, or positions that wait for a deep stage. On a CPU all of them attend row by row, like
decode rows: K/V of the launch are in their pages by then, and a prompt's pages stay in the cache from row to row. On
other devices, and where prompts are long, the second group attends in chunks. ``LaunchCache`` is what the model's
layers get as their key/value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tide_kernels import gpu
from tide_kernels.compact import gather_rows
from tide_kernels.decoder_layer import Places
from tide_kernels.paged_attention import paged_decode_attention, paged_extend_attention, unfit_heads
from tide_kernels.paged_attention_cpu import cpu_kernel_takes
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.transfers import upload
from tide_ray.models.row_cache import RowCache, attention_scale

MAX_TOKENS_BY_ROW = 2048
"""Tokens attended to up to which row by row is faster than torch's attention of a chunk: 9 times at 64, 1.4 at 2048."""

MAX_ROWS_IN_PAGES = 16
"""Rows of a sequence up to which a GPU kernel reads its pages in place instead of gathering them first."""


@dataclass(slots=True)
class Chunk:
    """Rows ``start:stop`` of a launch: tokens of one sequence at rising ``positions`` (long ``[rows]``).

    Neighbours that are whole sequences of one length make one chunk, and so one attention call: ``count`` sequences of
    the same ``positions``, one after another.
    """

    start: int
    stop: int
    positions: Tensor
    length: int  # tokens that the last row of a sequence attends to, itself included
    is_whole: bool  # the rows are all of the sequence's tokens, so nothing lies before them
    pages: Tensor  # page numbers of the sequence, long; of the first one where there are several
    count: int = 1
    masks: dict[int, Tensor] = field(default_factory=dict)  # by sliding window, built once per launch
    paged: tuple[Tensor, Tensor, Tensor] | None = None  # built once per launch, see ``in_pages``

    def mask(self, window: int) -> Tensor:
        """Which of its sequence's tokens each row may see, ``[rows, length]`` bool."""
        if window not in self.masks:
            query = self.positions[:, None]
            key = torch.arange(self.length, device=query.device)[None, :]
            visible = key <= query
            if window:
                visible &= key > query - window
            self.masks[window] = visible
        return self.masks[window]

    def in_pages(self) -> tuple[Tensor, Tensor, Tensor]:
        """Page table, row starts and lengths of its one sequence, as ``paged_extend_attention`` takes them."""
        if self.paged is None:
            num_rows = self.stop - self.start
            starts = torch.arange(0, 2 * num_rows, num_rows, dtype=torch.int32, device=self.positions.device)
            self.paged = self.pages.int()[None], starts, (self.positions + 1).int()
        return self.paged

    def sequences(self, states: Tensor) -> Tensor:
        """The chunk's part of ``[H, N, d]``, by sequence: ``[count, H, rows, d]``."""
        return states[:, self.start : self.stop].unflatten(1, (self.count, -1)).transpose(0, 1)


@dataclass(slots=True)
class RowBatch:
    """One launch's rows. N rows: the first ``num_decode`` are decode rows, the first R attend row by row, the rest in
    ``chunks``.

    token_ids, positions, write_pages, write_offsets: long ``[N]``; pages: int32 ``[R, max_pages]``, page numbers of
    each row's sequence; lengths: int32 ``[R]``, tokens it attends to.
    """

    token_ids: Tensor
    positions: Tensor
    write_pages: Tensor
    write_offsets: Tensor
    pages: Tensor
    lengths: Tensor
    num_decode: int = field(kw_only=True)
    chunks: list[Chunk] = field(kw_only=True)

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_by_row(self) -> int:
        return self.lengths.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is known of the rows, by row."""
        return [self.token_ids, self.positions, self.write_pages, self.write_offsets, self.pages, self.lengths]

    def select(self, index: Tensor, *, num_decode: int) -> RowBatch:
        """Rows ``index`` (long ``[n]``, rising) of a launch without chunks; ``num_decode`` of them decode."""
        assert not self.chunks, "chunks have rows that belong together"
        return RowBatch(*(gather_rows(tensor, index) for tensor in self.tensors), num_decode=num_decode, chunks=[])


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Tokens of one sequence at rising ``positions``, to be run in one launch. A decode span is a single token."""

    token_ids: Sequence[int]
    positions: np.ndarray  # int64
    pages: np.ndarray  # int32 page numbers of the sequence
    is_decode: bool

    @classmethod
    def run(cls, token_ids: Sequence[int], start: int, pages: np.ndarray, *, is_decode: bool) -> RowSpan:
        """Consecutive tokens, the first at position ``start``."""
        return cls(token_ids, np.arange(start, start + len(token_ids)), pages, is_decode)

    def select(self, kept: np.ndarray) -> RowSpan:
        """The tokens for which ``kept`` (bool, one for each) holds."""
        if kept.all():
            return self
        index = np.flatnonzero(kept)
        return RowSpan([self.token_ids[int(i)] for i in index], self.positions[index], self.pages, self.is_decode)


def attends_by_row(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows of prompts attend row by row too, where they see at most MAX_TOKENS_BY_ROW tokens."""
    return cpu_kernel_takes(device, dtype)


def build_rows(spans: Sequence[RowSpan], page_size: int, device: torch.device, *, by_row: bool = False) -> RowBatch:
    """Pack spans into rows; decode spans must come first. ``by_row``: see ``attends_by_row``."""
    token_ids = np.array([token for span in spans for token in span.token_ids], dtype=np.int64)
    positions = np.concatenate([span.positions for span in spans])
    write_pages = np.concatenate([span.pages[span.positions // page_size] for span in spans])
    num_decode = sum(span.is_decode for span in spans)
    assert all(span.is_decode for span in spans[:num_decode]), "decode spans come first"
    by_row = by_row and all(span.positions[-1] < MAX_TOKENS_BY_ROW for span in spans[num_decode:])
    one_by_one = spans if by_row else spans[:num_decode]
    counts = [len(span.positions) for span in one_by_one]
    lengths = (positions[: sum(counts)] + 1).astype(np.int32)
    width = int(-(-lengths.max() // page_size)) if len(lengths) else 0
    table = np.zeros((len(one_by_one), width), dtype=np.int32)
    for row, span in zip(table, one_by_one, strict=True):
        used = min(width, len(span.pages))
        row[:used] = span.pages[:used]
    table = np.repeat(table, counts, axis=0)
    pieces = [] if by_row else _pieces(spans[num_decode:], num_decode)
    arrays = [token_ids, positions, write_pages.astype(np.int64), positions % page_size, table, lengths]
    for piece in pieces:
        pages = piece.span.pages[: -(-piece.length // page_size)]
        arrays += [piece.span.positions, pages.astype(np.int64)]
    tensors = upload(arrays, device)
    chunks = [
        Chunk(piece.start, piece.stop, of_rows, piece.length, piece.is_whole, pages, piece.count)
        for piece, of_rows, pages in zip(pieces, tensors[6::2], tensors[7::2], strict=True)
    ]
    return RowBatch(*tensors[:6], num_decode=num_decode, chunks=chunks)


@dataclass(slots=True)
class _Piece:
    """A chunk to be; ``span`` is that of its first sequence."""

    start: int
    stop: int
    span: RowSpan
    length: int
    is_whole: bool
    count: int = 1


def _pieces(spans: Sequence[RowSpan], start: int) -> list[_Piece]:
    """The chunks of spans whose rows begin at row ``start``."""
    pieces: list[_Piece] = []
    for span in spans:
        stop = start + len(span.token_ids)
        length = int(span.positions[-1]) + 1
        is_whole = length == stop - start
        if is_whole and pieces and pieces[-1].is_whole and pieces[-1].length == length:
            pieces[-1].stop, pieces[-1].count = stop, pieces[-1].count + 1
        else:
            pieces.append(_Piece(start, stop, span, length, is_whole))
        start = stop
    return pieces


class LaunchCache(RowCache):
    """The cache object of one launch: writes the rows' K/V to their pages and attends over their sequences."""

    def __init__(self, pools: KVCache, rows: RowBatch) -> None:
        super().__init__()
        self._pools = pools
        self._rows = rows
        self._layer = -1

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, key, value = self._rows, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        self._pools.write(layer_idx, rows.write_pages, rows.write_offsets, key, value)
        self._layer = layer_idx
        return key_states, value_states

    def decode_places(self, layers: Sequence[int]) -> Places | None:
        rows, pools = self._rows, self._pools
        if rows.chunks:
            return None
        return Places(
            [(pools.key_pools[layer], pools.value_pools[layer]) for layer in layers],
            rows.write_pages,
            rows.write_offsets,
            rows.pages,
            rows.lengths,
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, window: int
    ) -> Tensor:
        rows, layer = self._rows, self._layer
        scale = attention_scale(query, scale)
        parts = []
        if rows.num_by_row:
            parts.append(
                paged_decode_attention(
                    query[0, :, : rows.num_by_row].transpose(0, 1),
                    self._pools.key_pools[layer],
                    self._pools.value_pools[layer],
                    rows.pages,
                    rows.lengths,
                    scale=scale,
                    softcap=softcap,
                    window=window,
                )
            )
        for chunk in rows.chunks:
            if attends_in_pages(chunk, query):
                table, starts, lengths = chunk.in_pages()
                parts.append(
                    paged_extend_attention(
                        query[0, :, chunk.start : chunk.stop].transpose(0, 1),
                        self._pools.key_pools[layer],
                        self._pools.value_pools[layer],
                        table,
                        starts,
                        lengths,
                        max_rows=chunk.stop - chunk.start,
                        scale=scale,
                        softcap=softcap,
                        window=window,
                    )
                )
                continue
            if chunk.is_whole:
                k, v = chunk.sequences(key[0]), chunk.sequences(value[0])
            else:
                k, v = (states[None] for states in self._pools.gather(layer, chunk.pages, chunk.length))
            out = _extend_attention(chunk.sequences(query[0]), k, v, chunk, scale=scale, softcap=softcap, window=window)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]


def attends_in_pages(chunk: Chunk, query: Tensor) -> bool:
    """Whether a chunk's rows are so few that a kernel on its GPU reads the sequence's pages in place."""
    is_few = not chunk.is_whole and chunk.stop - chunk.start <= MAX_ROWS_IN_PAGES
    return is_few and gpu.run_on(query, unfit=unfit_heads(query.shape[-1]))


def _extend_attention(
    query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, *, scale: float, softcap: float, window: int
) -> Tensor:
    """A chunk's attention: query ``[count, H, n, d]``, key and value ``[count, H_kv, length, d]`` -> query's shape."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    window = window if window and window < chunk.length else 0
    if softcap:
        scores = (query @ key.transpose(2, 3)).float() * scale
        scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~chunk.mask(window), float("-inf"))
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    is_causal = chunk.is_whole and not window
    mask = None if is_causal else chunk.mask(window)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
