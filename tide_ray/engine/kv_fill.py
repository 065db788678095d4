"""K and V of the layers that rows skip: every position must be attended to in every layer.

``fitted``: one product with the KV head's weights gives all of them; ``copy``: the exit state goes through each skipped
layer's own norm and K/V projection (CALM, arXiv 2207.07061).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tide_kernels.compact import gather_rows
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.rows import RowBatch
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.readouts import kv_width
from tide_ray.exits.rotary import Rotary, rotary_tables
from tide_ray.models.adapter import Adapter
from tide_ray.models.layer_calls import LayerCall
from tide_ray.models.row_cache import KeyValueTap


@dataclass(frozen=True, slots=True)
class _LayerRun:
    """Neighbouring layers with one K/V shape, one rotation and shared tables; ``columns`` of the KV head's output."""

    first: int
    count: int
    kind: Rotary
    columns: slice


class KVFill:
    """Writes K/V of the layers past a boundary for rows that stop there.

    Args:
        kinds: how each layer rotates K; None where the model's rotation is not known, so that only ``copy`` works.
    """

    def __init__(
        self, adapter: Adapter, pools: KVCache, boundaries: Sequence[Boundary], kinds: Sequence[Rotary] | None
    ) -> None:
        self.adapter = adapter
        self.pools = pools
        self._boundaries = boundaries
        self._runs = [] if kinds is None else [self._layer_runs(b.depth, kinds) for b in boundaries]

    def _layer_runs(self, depth: int, kinds: Sequence[Rotary]) -> list[_LayerRun]:
        ids = torch.ones(1, dtype=torch.long, device=self.adapter.device)
        _, calls = self.adapter.prologue(ids, ids, KeyValueTap())
        tables = [rotary_tables(call) for call in calls]
        layers = range(depth, self.adapter.num_layers)

        def traits(layer: int) -> tuple[object, ...]:
            table = tables[layer]
            return self.adapter.kv_shapes[layer], kinds[layer], None if table is None else table[0].data_ptr()

        runs, column = [], 0
        for _, group in itertools.groupby(layers, traits):
            members = list(group)
            width = kv_width([self.adapter.kv_shapes[layer] for layer in members])
            runs.append(_LayerRun(members[0], len(members), kinds[members[0]], slice(column, column + width)))
            column += width
        return runs

    def fitted(self, boundary: int, states: Tensor, rows: RowBatch, index: Tensor, calls: Sequence[LayerCall]) -> None:
        """Fill for rows ``index`` (long ``[n]``) of a launch, whose unit-rms states are ``states`` ``[n, D]``."""
        head = self._boundaries[boundary].kv_head
        assert head is not None, "fitted K/V need a KV head"
        flat = head(states)
        pages, offsets = gather_rows(rows.write_pages, index), gather_rows(rows.write_offsets, index)
        for run in self._runs[boundary]:
            shape = self.adapter.kv_shapes[run.first]
            block = flat[:, run.columns].unflatten(1, (run.count, 2, shape.num_heads, shape.head_dim))
            tables = rotary_tables(calls[run.first])
            rotation = None if tables is None else run.kind.rotation(tables[0][index], tables[1][index])
            self.pools.write_layers(run.first, pages, offsets, block[:, :, 0], block[:, :, 1], rotation)

    def copied(self, boundary: int, hidden: Tensor, rows: RowBatch, index: Tensor) -> None:
        """Fill for rows ``index`` (long ``[n]``) of a launch, whose states are ``hidden`` ``[n, D]``."""
        tap = KeyValueTap()
        _, calls = self.adapter.prologue(rows.token_ids[index], rows.positions[index], tap)
        pages, offsets = rows.write_pages[index], rows.write_offsets[index]
        for layer in range(self._boundaries[boundary].depth, self.adapter.num_layers):
            key, value = self.adapter.keys_values(layer, hidden[None], calls[layer], tap)
            self.pools.write(layer, pages, offsets, key, value)
