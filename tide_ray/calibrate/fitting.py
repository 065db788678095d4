"""Fits exit heads and KV heads at every candidate depth, in one pass over the sequences."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.calibrate.corpus import Example, Progress
from tide_ray.calibrate.refine import RestrictedReadout, refined
from tide_ray.calibrate.reservoir import Reservoir
from tide_ray.calibrate.ridge import Sums, fit, low_rank, set_linear
from tide_ray.calibrate.screen import most_promising
from tide_ray.calibrate.statistics import FitStatistics, FitSums
from tide_ray.calibrate.trace import Tracer, TraceRows
from tide_ray.exits.readouts import ExitHead, KVHead, for_inference, kv_width, unit_rms
from tide_ray.models.adapter import Adapter, KVShape

PENALTY_SHARE = 0.1
"""Share of the sequences that chooses penalties, and whether a refined head is better."""
MAX_ROWS = 16_384


@dataclass(slots=True)
class Fitted:
    """Maps by depth, for the depths that are worth it; ``kv_scales`` as in Judge; ``shortlist``: rows of the LM head,
    or None; ``facts`` by depth; ``savings``: of every candidate depth alone, from the screen; ``num_rows``: rows fitted
    on."""

    heads: dict[int, ExitHead] = field(default_factory=dict)
    kv_heads: dict[int, KVHead] = field(default_factory=dict)
    kv_scales: dict[int, Tensor] = field(default_factory=dict)
    shortlist: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    savings: dict[int, float] = field(default_factory=dict)
    num_rows: int = 0

    @property
    def depths(self) -> list[int]:
        return list(self.heads)


class Fitter:
    """Fits at ``depths``; K/V only where ``fits_kv``."""

    def __init__(
        self,
        adapter: Adapter,
        tracer: Tracer,
        depths: Sequence[int],
        config: CalibrationConfig,
        progress: Progress,
        *,
        fits_kv: bool,
    ) -> None:
        self.adapter = adapter
        self.tracer = tracer
        self.depths = list(depths)
        self.config = config
        self.progress = progress
        self.fits_kv = fits_kv

    def new_statistics(self) -> FitStatistics:
        return FitStatistics(train=self._new_sums(), held=self._new_sums())

    def collect(self, statistics: FitStatistics, examples: Sequence[Example], start: int, stop: int) -> None:
        """Add ``examples[start:stop]``. The first PENALTY_SHARE of all examples are the held-out ones."""
        num_held = max(1, round(PENALTY_SHARE * len(examples)))
        middle = min(max(start, num_held), stop)
        for sums, first, last in ((statistics.held, start, middle), (statistics.train, middle, stop)):
            for rows in self.tracer.trace(examples[first:last], first=first):
                self._add(sums, rows)
                self.progress("fitting exit heads and KV heads", (int(rows.sequences[-1]) + 1) / len(examples))

    def fit(self, statistics: FitStatistics) -> Fitted:
        """Fit at the depths asked for, or else at the most promising ones."""
        train, held = statistics.train, statistics.held
        readout = self._readout(train.reservoir.take("final"))
        fitted = Fitted(num_rows=train.num_rows)
        if readout is not None and self.config.shortlist:
            fitted.shortlist = readout.shortlist(self.config.shortlist)
        heads: dict[int, ExitHead] = {}
        for depth in self.depths:
            heads[depth], fitted.facts[str(depth)] = self._head(train.heads[depth], held.heads[depth])
        kept = self.depths
        if readout is not None and not self.config.boundaries:
            device = self.adapter.device
            ready = {depth: head.to(device) for depth, head in heads.items()}
            kept, fitted.savings = most_promising(ready, held.reservoir, readout, self.adapter.num_layers)
        for depth in kept:
            facts = fitted.facts[str(depth)]
            fitted.heads[depth] = heads[depth]
            if readout is not None and self.config.refine:
                self.progress(f"refining the exit head at depth {depth}", 0.0)
                fitted.heads[depth], facts["is_refined"] = self._better(
                    heads[depth], depth, train.reservoir, held.reservoir, readout
                )
            if self.fits_kv:
                shapes = self.adapter.kv_shapes[depth:]
                weights, kv_penalty, kv_error = fit(train.kv[depth], held.kv[depth])
                kv_head = KVHead(self.adapter.config.hidden_size, shapes)
                set_linear(kv_head.project, weights)
                fitted.kv_heads[depth] = kv_head
                fitted.kv_scales[depth] = block_scales(train.kv[depth].targets / train.kv[depth].num_rows, shapes)
                facts |= {"kv_penalty": kv_penalty, "kv_error": round(kv_error, 4)}
        return fitted

    def _head(self, train: Sums, held: Sums) -> tuple[ExitHead, dict[str, Any]]:
        """An exit head by ridge regression, of the rank asked for, and what is known of it."""
        weights, penalty, error = fit(train, held)
        head = ExitHead(self.adapter.config.hidden_size, self.config.rank)
        if self.config.rank is None:
            set_linear(head.up, weights)
        else:
            down, up = low_rank(train, weights, self.config.rank)
            with torch.no_grad():
                head.down.weight.copy_(down.T)  # type: ignore[operator]
                head.up.weight.copy_(up.T)
                head.up.bias.copy_(weights[-1])
        return head, {"penalty": penalty, "head_error": round(error, 4)}

    def _new_sums(self) -> FitSums:
        hidden = self.adapter.config.hidden_size
        return FitSums(
            heads={depth: Sums.zeros(hidden, hidden) for depth in self.depths},
            kv={depth: Sums.zeros(hidden, kv_width(self.adapter.kv_shapes[depth:])) for depth in self.depths}
            if self.fits_kv
            else {},
            reservoir=Reservoir(MAX_ROWS, self.config.seed),
        )

    def _add(self, sums: FitSums, rows: TraceRows) -> None:
        index = torch.from_numpy(rows.is_judged.nonzero()[0])
        target = unit_rms(rows.final[index])
        for depth in self.depths:
            states = rows.states[depth]
            sums.heads[depth].add(states[index], target)
            if rows.keys_values is not None:
                width = sums.kv[depth].cross.shape[1]
                sums.kv[depth].add(states, rows.keys_values[:, -width:])
        kept = {f"state_{depth}": rows.states[depth][index].cpu() for depth in self.depths}
        sums.reservoir.add(rows.keys[index.numpy()], final=rows.final[index].cpu(), **kept)

    def _readout(self, final_states: Tensor) -> RestrictedReadout | None:
        try:
            return RestrictedReadout(self.adapter, final_states.to(self.adapter.device))
        except ValueError:
            return None

    def _better(
        self, head: ExitHead, depth: int, train: Reservoir, held: Reservoir, readout: RestrictedReadout
    ) -> tuple[ExitHead, bool]:
        """The refined head where it agrees with full depth more often on held-out rows, else the one given."""
        device = self.adapter.device
        candidate = refined(
            head.to(device),
            train.take(f"state_{depth}").to(device),
            train.take("final").to(device),
            readout,
            seed=self.config.seed,
        )
        states, final = held.take(f"state_{depth}").to(device), held.take("final").to(device)
        with torch.inference_mode():
            expected = readout(final).argmax(-1)
            scores = [
                float((readout(one(states.float()).to(final.dtype)).argmax(-1) == expected).float().mean())
                for one in (head, candidate)
            ]
        return (candidate, True) if scores[1] > scores[0] else (head, False)

    def ready(self, modules: dict[int, Any]) -> dict[int, Any]:
        """Copies of fitted maps as the engine will run them."""
        return {
            depth: for_inference(copy.deepcopy(module), self.adapter.device, self.adapter.dtype)
            for depth, module in modules.items()
        }


def block_scales(mean_squares: Tensor, shapes: Sequence[KVShape]) -> Tensor:
    """The mean square of each layer's K and V at all of their columns, from the mean square of every single column."""
    widths = [shape.num_heads * shape.head_dim for shape in shapes for _ in range(2)]
    return torch.cat([block.mean().expand(len(block)) for block in mean_squares.float().split(widths)])
