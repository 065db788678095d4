"""Run scheduled rows through the model: the second of the engine's three verbs (schedule, run, commit).

Rows pass the stages in order. At a boundary some stop: their token is read from the state there, and their K/V in
deeper layers are filled. The others go on at once, or wait until a launch of the next stage pays. The LM head runs once
per step, over everything whose token is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tide_kernels.compact import gather_rows
from tide_ray.engine.boundaries import BoundaryExits
from tide_ray.engine.flow import Arrivals, Flow, Leaving
from tide_ray.engine.graphs import StageGraphs
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.lanes import FOLLOWS, Lane, row_starts, scheduled_lane, waiting_lane, with_pending
from tide_ray.engine.launch import Launch
from tide_ray.engine.planner import LaunchPlanner
from tide_ray.engine.rows import LaunchCache, RowBatch, attends_by_row, build_rows
from tide_ray.engine.sampler import Sampler, SamplingRow
from tide_ray.engine.scheduler import ScheduledSpan
from tide_ray.engine.sequence import PendingState, Sequence
from tide_ray.engine.speculation import Trial, proposals
from tide_ray.engine.stages import Stage
from tide_ray.engine.transfers import upload, upload_one
from tide_ray.models.adapter import Adapter
from tide_ray.types import EngineStats


class Runner:
    """Owns the model, the K/V pools, the states that wait for a stage, and the sampler.

    Args:
        stages: shallowest first; with ``exits`` and ``planner`` there is a boundary after each but the last.
        waiting: the residents whose newest token waits for a stage.
        max_residents: slots of waiting states.
        prefill_tail: last tokens of a prompt that always run every layer.
        graphs: of launches that only decode, where there are graphs.
    """

    def __init__(
        self,
        adapter: Adapter,
        stages: Seq[Stage],
        pools: KVCache,
        stats: EngineStats,
        *,
        waiting: Callable[[int], list[Sequence]],
        max_residents: int,
        prefill_tail: int = 1,
        graphs: StageGraphs | None = None,
    ) -> None:
        self.adapter = adapter
        self.stages = stages
        self.pools = pools
        self.stats = stats
        self.sampler = Sampler()
        self.exits: BoundaryExits | None = None
        self.planner: LaunchPlanner | None = None
        self.graphs = graphs
        self._waiting = waiting
        self._by_row = attends_by_row(adapter.device, adapter.dtype)
        self._prefill_tail = prefill_tail
        self._num_prompt_rows = 0  # of the last step
        size = (len(stages) - 1, max_residents, adapter.config.hidden_size)
        self._states = torch.zeros(size, dtype=adapter.dtype, device=adapter.device)

    @torch.inference_mode()
    def run(self, spans: Seq[ScheduledSpan], ahead: Launch | None = None) -> Launch:
        """One step: stage 0 over the spans' rows, deeper stages over what is ready for them; the tokens now chosen.

        On a GPU all of it is only queued, but for the asking of boundaries. ``ahead``: the step before, where its
        tokens have not been read; sequences go on from them, and no boundary is asked.
        """
        lanes = [scheduled_lane(span, self.adapter.num_layers, self._prefill_tail) for span in spans]
        is_on, probes = self._plan(lanes)
        if ahead is not None:
            is_on, probes = (False,) * len(is_on), False
        arrived: Flow | Arrivals | None = self.prepared(lanes, ahead=ahead) if lanes else None
        leaving: list[Leaving] = []
        if isinstance(arrived, Flow) and not any(is_on) and not probes and self._may_skip_boundaries(lanes):
            self._launch(range(len(self.stages)), arrived)
            return self._choose(self._finished(arrived))
        for index in range(len(self.stages)):
            flow = self._enter(index, arrived, must_launch=not spans)
            if flow is None:
                arrived = None
                continue
            self._launch([index], flow)
            if index == len(self.stages) - 1:
                leaving += self._finished(flow)
            else:
                arrived, left = self._at_boundary(index, flow, is_on=is_on[index], probes=probes)
                leaving += [left] if left is not None else []
        return self._choose(leaving)

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next step can be queued while tokens of the last one are unread: no boundary is about to be
        asked, which would wait for the device, and no row waits for a stage."""
        if self.planner is None:
            return True
        if any(self.planner.current.is_on) or self.planner.probes_next:
            return False
        return not self._any_waits

    def drafts_judged(self, num_right: int, num_wrong: int) -> None:
        """Drafts of a chain that full depth confirmed, and whether one was wrong: what drafting is worth."""
        if self.planner is not None:
            self.planner.observe_drafts(num_right, num_wrong)

    def stepped(self, seconds: float, num_tokens: int) -> None:
        """How long the last step took, scheduling and committing included, and how many tokens were committed in it."""
        if self.planner is not None:
            self.planner.stepped(seconds, num_tokens, self._num_prompt_rows)

    # ---- stages ----

    def _plan(self, lanes: Seq[Lane]) -> tuple[tuple[bool, ...], bool]:
        if self.planner is None:
            return (False,) * len(self.stages), False
        waiting = sum(len(self._waiting(stage)) for stage in range(1, len(self.stages)))
        num_decoding = sum(lane.may_wait for lane in lanes)
        self._num_prompt_rows = sum(lane.num_rows for lane in lanes if not lane.may_wait)
        plan = self.planner.plan(num_decoding + waiting)
        return plan.is_on, self.planner.probes

    def _may_skip_boundaries(self, lanes: Seq[Lane]) -> bool:
        """Whether nothing can leave, join or wait between the stages of these lanes while every boundary is off."""
        if len(self.stages) == 1 or self.graphs is not None:
            return False
        alone = all(lane.span.is_decode and not lane.sequence.pending for lane in lanes)
        return alone and not self._any_waits

    @property
    def _any_waits(self) -> bool:
        """Whether some resident's newest token waits for a stage."""
        return any(self._waiting(stage) for stage in range(1, len(self.stages)))

    def _launch(self, indices: Seq[int], flow: Flow) -> None:
        """Take the rows of a launch through neighbouring stages, all of them in one go."""
        start = time.perf_counter()
        if len(indices) == 1:
            self.run_stage(indices[0], flow)
        else:
            layers = [layer for index in indices for layer in self.stages[index].layers]
            flow.hidden = self.adapter.run_layers(layers, flow.hidden[None], flow.calls, flow.cache)[0]
        # On a GPU the work has only been queued by now, and waiting for it would cost more than the knowledge is worth.
        is_decode = flow.rows.num_decode == flow.rows.num_rows
        if self.planner is not None and is_decode and self.adapter.device.type == "cpu":
            self.planner.took(indices, flow.rows.num_rows, time.perf_counter() - start)
        num_deferred = sum(int((lane.fates == FOLLOWS).sum()) for lane in flow.lanes if lane.num_rows > 1)
        for stage in (self.stages[index] for index in indices):
            for layer in stage.layers:
                self.stats.rows_through_layer[layer] += flow.rows.num_rows
            self.stats.launches[stage.name] = self.stats.launches.get(stage.name, 0) + 1
            if num_deferred:
                self.stats.deferred_rows[stage.name] = self.stats.deferred_rows.get(stage.name, 0) + num_deferred

    def run_stage(self, index: int, flow: Flow) -> None:
        """Take the rows of a launch through the layers of stage ``index``."""
        if self.graphs is None or not self.graphs.run(index, flow):
            flow.hidden = self.stages[index].run(self.adapter, flow.hidden[None], flow.calls, flow.cache)[0]

    def _at_boundary(
        self, index: int, flow: Flow, *, is_on: bool, probes: bool
    ) -> tuple[Flow | Arrivals | None, Leaving | None]:
        if self.exits is None or self.planner is None:
            return flow, None
        if probes and not is_on:
            self.planner.observe(index, *self.exits.probe(index, flow))
        goes_on, leaving = self.exits.split(index, flow, is_on=is_on)
        self.planner.observe(index, *self.exits.take_observed(index))
        return goes_on, leaving

    def _enter(self, index: int, arrived: Flow | Arrivals | None, *, must_launch: bool) -> Flow | None:
        """The next launch of stage ``index``, or None while its rows wait (or there are none)."""
        if index == 0 or self.planner is None:
            assert arrived is None or isinstance(arrived, Flow), "nothing leaves a launch without exits"
            return arrived
        waiting = self._waiting(index)
        lanes = arrived.lanes if arrived is not None else []
        num_ready = len(waiting) + len(lanes)
        goes = self.planner.should_launch(index, num_ready)
        if not (goes or must_launch or any(not lane.may_wait for lane in lanes)):
            if arrived is not None:
                self._hold(index, arrived)
            return None
        if not num_ready:
            return None
        self.planner.launched(index)
        has_pending = any(lane.pending for lane in lanes)
        if arrived is not None and not waiting and not has_pending:
            return arrived if isinstance(arrived, Flow) else self.prepared(arrived.lanes, arrived.hidden)
        merged = self._merged(index, arrived, waiting)
        return self.prepared(merged.lanes, merged.hidden)

    def _hold(self, index: int, flow: Flow | Arrivals) -> None:
        """Keep every lane's states until stage ``index`` is launched."""
        starts = row_starts(flow.lanes)
        slots = np.array([lane.sequence.slot for lane in flow.lanes])
        last, slots_there = upload([starts[1:] - 1, slots], flow.hidden.device)
        self._states[index - 1, slots_there] = flow.hidden[last]
        for lane, start in zip(flow.lanes, starts, strict=False):
            lane.sequence.stage = index
            lane.sequence.waiting_score = lane.score
            for row in np.flatnonzero(lane.fates == FOLLOWS):
                state = flow.hidden[start + row].clone()
                lane.sequence.pending.append(PendingState(index, int(lane.span.positions[row]), state))

    def _merged(self, index: int, flow: Flow | Arrivals | None, waiting: Seq[Sequence]) -> Arrivals:
        """The flow's rows, those of waiting sequences, and the positions that these drag along."""
        sources: list[Tensor] = [] if flow is None else [flow.hidden]
        num_rows = 0 if flow is None else len(flow.hidden)
        entries: list[tuple[Lane, np.ndarray]] = []
        if flow is not None:
            starts = row_starts(flow.lanes)
            entries += [(lane, np.arange(starts[n], starts[n + 1])) for n, lane in enumerate(flow.lanes)]
        if waiting:
            slots = upload_one(np.array([sequence.slot for sequence in waiting]), self._states.device)
            sources.append(self._states[index - 1, slots])
            entries += [(waiting_lane(sequence), np.array([num_rows + n])) for n, sequence in enumerate(waiting)]
            num_rows += len(waiting)
            for sequence in waiting:
                sequence.stage = 0
        for n, (lane, origin) in enumerate(entries):
            pending = [p for p in lane.pending if p.stage == index]
            if pending:
                taken = {p.position for p in pending}
                lane.sequence.pending[:] = [p for p in lane.sequence.pending if p.position not in taken]
                merged, by_position = with_pending(lane, pending)
                rows = np.concatenate([np.arange(num_rows, num_rows + len(pending)), origin])
                entries[n] = merged, rows[by_position]
                sources.append(torch.stack([p.state for p in pending]))
                num_rows += len(pending)
        entries.sort(key=lambda entry: not entry[0].span.is_decode)  # decode lanes first, else as they were
        order = upload_one(np.concatenate([rows for _, rows in entries]), self._states.device)
        return Arrivals([lane for lane, _ in entries], torch.cat(sources)[order])

    def prepared(self, lanes: list[Lane], hidden: Tensor | None = None, *, ahead: Launch | None = None) -> Flow:
        """A launch of these rows: their states, or else the model's embeddings, and its call for each layer."""
        spans = [lane.span for lane in lanes]
        rows = build_rows(spans, self.pools.page_size, self.adapter.device, by_row=self._by_row)
        if ahead is not None:
            _take_tokens(rows, lanes, ahead)
        cache = LaunchCache(self.pools, rows)
        return Flow(lanes, rows, cache, partial(self.adapter.prologue, rows.token_ids, rows.positions, cache), hidden)

    # ---- tokens ----

    def _finished(self, flow: Flow) -> list[Leaving]:
        """Tokens of full depth: each sampling lane's last row chooses one, and a row for each draft of its sequence."""
        lanes: list[Lane] = []
        rows: list[int] = []
        num_drafts: list[int] = []
        for lane, end in zip(flow.lanes, row_starts(flow.lanes)[1:], strict=True):
            if lane.samples:
                count = len(lane.sequence.drafts) + 1
                assert count <= lane.num_rows, "drafts come from pending positions"
                lanes += [lane] * count
                rows += range(end - count, end)
                num_drafts += range(count)
        if not rows:
            return []
        is_all = len(rows) == len(flow.hidden)
        states = flow.hidden if is_all else flow.hidden[upload_one(np.array(rows), flow.hidden.device)]
        return [Leaving(lanes, states, self.stages[-1].depth, num_drafts)]

    def _choose(self, leaving: Seq[Leaving]) -> Launch:
        if not leaving:
            return Launch([], [], None)
        states = torch.cat([left.states for left in leaving])
        lanes = [lane for left in leaving for lane in left.lanes]
        depths = [left.depth for left in leaving for _ in left.lanes]
        num_drafts = [number for left in leaving for number in left.num_drafts]
        rows = [sampling_row(lane.sequence, number) for lane, number in zip(lanes, num_drafts, strict=True)]
        logits = self._logits(states)
        if self.exits is None or not self.exits.verifies:
            return Launch(lanes, depths, self.sampler.choose(logits, rows))
        sequences = [lane.sequence for lane in lanes]
        trial = Trial.of(sequences, num_drafts, rows, self._logits)
        choice = self.sampler.choose(logits, rows, trial.settle if trial is not None else None)
        is_draft = [depth < self.stages[-1].depth for depth in depths]
        return Launch(lanes, depths, choice, proposals(sequences, is_draft, rows, states, logits, choice.tokens))

    def _logits(self, states: Tensor) -> Tensor:
        """Pre-norm states ``[n, D]`` -> ``[n, V]``."""
        return self.adapter.head(self.adapter.final_norm(states[None]))


def _take_tokens(rows: RowBatch, lanes: Seq[Lane], ahead: Launch) -> None:
    """Put tokens that the host does not know yet in their rows. Each is a decode lane's, whose row has its number."""
    numbers = [n for n, lane in enumerate(lanes) if lane.sequence.num_ahead]
    if numbers:
        sources = np.arange(rows.num_rows)
        sources[numbers] = rows.num_rows + np.array([ahead.place(lanes[n].sequence) for n in numbers])
        both = torch.cat((rows.token_ids, ahead.tokens))
        rows.token_ids = gather_rows(both, upload_one(sources, both.device))


def sampling_row(sequence: Sequence, num_drafts: int = 0) -> SamplingRow:
    """What the sampler must know to choose the sequence's next token, after its first ``num_drafts`` drafts."""
    position = len(sequence.output_ids) + num_drafts + sequence.num_ahead
    params = sequence.params
    needs_history = params.repetition_penalty != 1.0
    return SamplingRow(
        params=params,
        seed=sequence.seed,
        position=position,
        token_ids=sequence.prompt_ids + sequence.answer_with_drafts(num_drafts) if needs_history else (),
        suppressed=tuple(sequence.stop_ids) if position < params.min_tokens else (),
    )
