"""What happens at a boundary: who stops, their K/V in deeper layers, and the state that their token is read from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from tide_kernels.compact import gather_rows
from tide_ray.engine.flow import Arrivals, Flow, Leaving
from tide_ray.engine.kv_fill import KVFill
from tide_ray.engine.lanes import ASKED, FOLLOWS, PREFILL, Lane, row_starts
from tide_ray.engine.rows import LaunchCache
from tide_ray.engine.sequence import PendingState, Sequence
from tide_ray.engine.speculation import must_run_deep
from tide_ray.engine.transfers import upload, upload_one
from tide_ray.exits.checkpoint import Boundary
from tide_ray.exits.policies import Candidates, ExitPolicy
from tide_ray.exits.readouts import unit_rms
from tide_ray.models.layer_calls import LayerCall, selected_calls
from tide_ray.types import EngineStats


class BoundaryExits:
    """Applies an exit policy and a KV policy.

    Args:
        boundaries: calibrated, shallowest first, ready for inference.
        policy: decides for tokens being generated.
        kv_policy: ``fitted``, ``copy``, ``deferred``, or ``full``: all layers run and states are only selected.
        prefill_thresholds: at each boundary, predicted damage below which prompt tokens stop; None: they go on.
        verifies: tokens chosen at a boundary are drafts, of which a sequence may have so many only.
    """

    def __init__(
        self,
        boundaries: Seq[Boundary],
        policy: ExitPolicy,
        fill: KVFill,
        stats: EngineStats,
        *,
        kv_policy: str,
        prefill_thresholds: Seq[float | None],
        verifies: bool = False,
    ) -> None:
        self.boundaries = boundaries
        self.policy = policy
        self.fill = fill
        self.stats = stats
        self.kv_policy = kv_policy
        self.prefill_thresholds = list(prefill_thresholds)
        self.verifies = verifies
        self.observed = [[0, 0] for _ in boundaries]  # rows asked, rows stopped, since last taken

    def split(self, boundary: int, flow: Flow, *, is_on: bool) -> tuple[Flow | Arrivals | None, Leaving | None]:
        """Part the rows of a launch that has reached ``boundary``: those that go on, and tokens to choose now.

        What goes on is the launch itself where nothing left it.

        ``is_on``: whether tokens being generated may stop here.
        """
        fates = np.concatenate([lane.fates for lane in flow.lanes])
        depth = self.boundaries[boundary].depth
        threshold = self.prefill_thresholds[boundary]
        stops = (fates > 0) & (fates <= depth)
        asks_prompt = threshold is not None and bool((fates == PREFILL).any())
        if not (is_on and (fates == ASKED).any()) and not asks_prompt and not stops.any():
            return flow, None
        states = unit_rms(flow.hidden)
        starts = row_starts(flow.lanes)
        if is_on:
            self._ask(boundary, flow.lanes, states, starts, fates, stops)
        if asks_prompt:
            stops |= self._prompt_stops(boundary, flow.lanes, states, fates)
        if self.kv_policy == "full":
            chosen = states[upload_one(np.flatnonzero(stops), states.device)]
            return flow, self._select(boundary, flow, chosen, starts, stops)
        if not stops.any():
            return flow, None
        index = upload_one(np.flatnonzero(stops), states.device)
        states = gather_rows(states, index)
        self._keep_attendable(boundary, flow, states, index, starts, stops)
        leaving = self._leaving(boundary, flow, states, starts, stops)
        return self._survivors(flow, starts, stops), leaving

    def probe(self, boundary: int, flow: Flow) -> tuple[int, int]:
        """How many rows would be asked at a boundary that is off, and how many of them would stop. None stops."""
        last = upload_one(row_starts(flow.lanes)[1:] - 1, flow.hidden.device)
        ends = [Lane(lane.sequence, lane.span, lane.fates[-1:], lane.samples) for lane in flow.lanes]
        fates = np.concatenate([lane.fates for lane in ends])
        nowhere = np.zeros(len(ends), dtype=bool)
        self._ask(boundary, ends, unit_rms(flow.hidden[last]), np.arange(len(ends) + 1), fates, nowhere)
        return self.take_observed(boundary)

    def take_observed(self, boundary: int) -> tuple[int, int]:
        """Rows asked and rows stopped at a boundary since this was called last."""
        asked, stopped = self.observed[boundary]
        self.observed[boundary] = [0, 0]
        return asked, stopped

    def _ask(
        self, boundary: int, lanes: list[Lane], states: Tensor, starts: np.ndarray, fates: np.ndarray, stops: np.ndarray
    ) -> None:
        """Let the policy decide for the rows that ask; rows that follow do as the last row of their lane."""
        numbers = [n for n, lane in enumerate(lanes) if lane.fates[-1] == ASKED]
        if not numbers:
            return
        asking = [lanes[n] for n in numbers]
        last = starts[np.array(numbers) + 1] - 1
        rows = states if len(last) == len(states) else states[upload_one(last, states.device)]
        verdict = self.policy.decide(
            Candidates(
                boundary=boundary,
                states=rows,
                thresholds=np.array([self._threshold(boundary, lane.sequence) for lane in asking]),
                scorers=[lane.sequence.exit_rules.scorer for lane in asking],
                keys=[(lane.sequence.seed, lane.sequence.num_tokens) for lane in asking],
            )
        )
        for lane, score in zip(asking, verdict.scores, strict=True):
            lane.score = float(score)
        self.observed[boundary][0] += len(asking)
        self.observed[boundary][1] += int(verdict.stops.sum())
        stops[last] = verdict.stops
        for n, stop in zip(numbers, verdict.stops, strict=True):
            if stop and lanes[n].num_rows > 1:
                begin, end = starts[n], starts[n + 1]
                stops[begin:end] |= fates[begin:end] == FOLLOWS

    def _threshold(self, boundary: int, sequence: Sequence) -> float:
        """Score from which its newest token stops."""
        return math.inf if self.verifies and must_run_deep(sequence) else sequence.exit_rules.thresholds[boundary]

    def _prompt_stops(self, boundary: int, lanes: Seq[Lane], states: Tensor, fates: np.ndarray) -> np.ndarray:
        gate = self.boundaries[boundary].prefill_gate
        assert gate is not None, "prefill exits need a prefill gate"
        prompt = np.flatnonzero(fates == PREFILL)
        positions = np.concatenate([lane.span.positions for lane in lanes])[prompt]
        ends, counts = zip(*((len(lane.sequence.prompt_ids), lane.num_rows) for lane in lanes), strict=True)
        lengths = np.repeat(ends, counts)[prompt]
        index, at, of = upload([prompt, positions, lengths], states.device)
        damages = gate.damages(states[index], at, of).cpu().numpy()
        stops = np.zeros(len(fates), dtype=bool)
        stops[prompt] = damages < self.prefill_thresholds[boundary]
        self.stats.num_prefill_exits += int(stops.sum())
        return stops

    def _keep_attendable(
        self, boundary: int, flow: Flow, states: Tensor, index: Tensor, starts: np.ndarray, stops: np.ndarray
    ) -> None:
        """K/V past the boundary for the rows that stop: written now, or, deferred, their states kept."""
        filled = np.flatnonzero(stops)
        if self.kv_policy == "deferred":
            is_prompt = np.concatenate([lane.fates == PREFILL for lane in flow.lanes])[filled]
            for n, row in zip(np.searchsorted(starts, filled, side="right") - 1, filled, strict=True):
                lane = flow.lanes[n]
                if lane.fates[row - starts[n]] != PREFILL:
                    position = int(lane.span.positions[row - starts[n]])
                    lane.sequence.pending.append(PendingState(boundary + 1, position, flow.hidden[row].clone()))
            if not is_prompt.any():
                return
            chosen = upload_one(np.flatnonzero(is_prompt), index.device)
            states, index = states[chosen], index[chosen]
        if self.kv_policy == "copy":
            self.fill.copied(boundary, flow.hidden[index], flow.rows, index)
        else:
            self.fill.fitted(boundary, states, flow.rows, index, flow.calls)
        self.stats.num_filled_rows += len(index)

    def _leaving(
        self, boundary: int, flow: Flow, states: Tensor, starts: np.ndarray, stops: np.ndarray
    ) -> Leaving | None:
        """Tokens to choose from ``states``, those of the rows that stop."""
        last = starts[1:] - 1
        numbers = [n for n, lane in enumerate(flow.lanes) if lane.samples and stops[last[n]]]
        if not numbers:
            return None
        if len(numbers) != len(states):
            places = np.cumsum(stops) - 1
            states = states[upload_one(places[last[numbers]], states.device)]
        head = self.boundaries[boundary]
        lanes = [flow.lanes[n] for n in numbers]
        return Leaving(lanes, head.head(states), head.depth, [len(lane.sequence.drafts) for lane in lanes])

    def _select(
        self, boundary: int, flow: Flow, states: Tensor, starts: np.ndarray, stops: np.ndarray
    ) -> Leaving | None:
        """Post hoc: note the first boundary at which a token would have stopped; its rows run on."""
        leaving = self._leaving(boundary, flow, states, starts, stops)
        for lane in leaving.lanes if leaving is not None else ():
            lane.samples = False
            lane.fates[-1] = self.boundaries[boundary].depth  # asked no more
        return leaving

    def _survivors(self, flow: Flow, starts: np.ndarray, stops: np.ndarray) -> Flow | Arrivals | None:
        if stops.all():
            return None
        if len(stops) == len(flow.lanes):  # one row each, as in most launches
            lanes = [lane for lane, stop in zip(flow.lanes, stops.tolist(), strict=True) if not stop]
        else:
            kept = [~stops[begin:end] for begin, end in itertools.pairwise(starts)]
            lanes = [lane.select(rows) for lane, rows in zip(flow.lanes, kept, strict=True) if rows.any()]
        index = upload_one(np.flatnonzero(~stops), flow.hidden.device)
        if flow.rows.chunks or not self.fill.adapter.calls_are_by_row:
            return Arrivals(lanes, gather_rows(flow.hidden, index))
        return self._narrowed(flow, lanes, index)

    def _narrowed(self, flow: Flow, lanes: list[Lane], index: Tensor) -> Flow:
        """The launch with rows ``index`` alone, which spares asking the model again how it calls its layers."""
        rows = flow.rows.select(index, num_decode=sum(lane.span.is_decode for lane in lanes))
        cache = LaunchCache(self.fill.pools, rows)
        hidden = gather_rows(flow.hidden, index)

        def start() -> tuple[Tensor, list[LayerCall]]:
            calls = selected_calls(flow.calls, index, num_rows=flow.rows.num_rows, cache=flow.cache, new_cache=cache)
            return hidden[None], calls

        return Flow(lanes, rows, cache, start, hidden)
