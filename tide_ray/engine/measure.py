"""Measures what launches cost on this machine, at start-up: rows that decode over K/V of a typical length."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from tide_ray.engine.boundaries import BoundaryExits
from tide_ray.engine.cost_model import CostCurve, EngineCosts
from tide_ray.engine.flow import Arrivals, Flow
from tide_ray.engine.lanes import ASKED, Lane
from tide_ray.engine.rows import RowSpan
from tide_ray.engine.runner import Runner
from tide_ray.engine.sequence import ExitRules, Sequence
from tide_ray.exits.policies import Candidates, ExitPolicy, Verdict
from tide_ray.exits.readouts import unit_rms
from tide_ray.types import EngineStats, SamplingParams

SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512)
REPEATS = 5
CONTEXT = 192
"""Tokens that each row attends to while measuring."""


@torch.inference_mode()
def measure_costs(runner: Runner, exits: BoundaryExits, max_residents: int, context: int = CONTEXT) -> EngineCosts:
    """Time every stage, gate, exit and the head at up to ``max_residents`` rows. Takes a few seconds on a CPU.

    Writes K/V into free pages; call it before anything is resident.
    """
    sizes = (*(size for size in SIZES if size < max_residents), max_residents)
    trial = BoundaryExits(
        exits.boundaries,
        _FirstStops(exits.policy),
        exits.fill,
        EngineStats(rows_through_layer=[0] * runner.adapter.num_layers),
        kv_policy=exits.kv_policy,
        prefill_thresholds=[None] * len(exits.boundaries),
    )
    longest = max(range(len(runner.stages)), key=lambda index: len(runner.stages[index].layers))
    num_stages, num_boundaries = len(runner.stages), len(exits.boundaries)
    rounds: list[list[list[float]]] = []  # by round, size and what is timed
    for _ in range(REPEATS + 1):
        one_row = _launch_of(runner, 1, context)
        # Small things as well are used again only after the stages' weights have passed through the caches.
        between = partial(_run, runner, longest, one_row, one_row.hidden)
        rounds.append([])
        for size in sizes:
            flow = _launch_of(runner, size, context)
            states = flow.hidden.clone()
            # Stages take turns, as in a step: one stage's weights may fit into a cache that all together do not.
            turns = [partial(_run, runner, index, flow, states) for index in range(num_stages)]
            for number in range(num_boundaries):
                part = partial(_part, runner, trial, number, states, flow)
                turns += [between, part, between, partial(_exit, exits, number, states, flow)]
            turns += [between, partial(_head, runner, states)]
            rounds[-1].append([_timed(runner, work) for work in turns])
    # A size's samples are a whole round apart: other tenants of a machine slow it down for a second at a time.
    medians = np.median(rounds[1:], axis=0).T.tolist()  # the first round warms up
    parted = medians[num_stages + 1 : -2 : 4]
    left = medians[num_stages + 3 : -2 : 4]
    # One row left while parting, and the first size is 1.
    gates = [[max(seconds - leaving[0], 0.0) for seconds in each] for each, leaving in zip(parted, left, strict=True)]
    return EngineCosts(
        stages=tuple(CostCurve.consistent(sizes, seconds) for seconds in medians[:num_stages]),
        gates=tuple(CostCurve(sizes, tuple(seconds)) for seconds in gates),
        exits=tuple(CostCurve.consistent(sizes, seconds) for seconds in left),
        head=CostCurve.consistent(sizes, medians[-1]),
    )


class _FirstStops:
    """Asks a policy for the time that it takes; then the first row stops, so that a launch of the others is made."""

    def __init__(self, policy: ExitPolicy) -> None:
        self._policy = policy

    def decide(self, rows: Candidates) -> Verdict:
        return Verdict(np.arange(len(rows.thresholds)) == 0, self._policy.decide(rows).scores)


def _launch_of(runner: Runner, size: int, context: int) -> Flow:
    """``size`` decode rows, each over pages of its own as far as there are enough."""
    pools, graphs = runner.pools, runner.graphs
    context = min(context, pools.num_pages * pools.page_size)
    if graphs is not None:
        context = min(context, graphs.max_pages * pools.page_size)
    pages_each = -(-context // pools.page_size)
    rules = ExitRules((0.0,) * len(runner.stages))
    lanes = []
    for row in range(size):
        pages = (np.arange(pages_each) + row * pages_each) % pools.num_pages
        span = RowSpan.run([1], context - 1, pages, is_decode=True)
        sequence = Sequence("", 0, [1], SamplingParams(), row, frozenset(), 1, 0, exit_rules=rules)
        lanes.append(Lane(sequence, span, np.array([ASKED], dtype=np.int32), samples=True))
    return runner.prepared(lanes)


def _run(runner: Runner, index: int, flow: Flow, states: torch.Tensor) -> None:
    flow.hidden = states
    runner.run_stage(index, flow)


def _part(runner: Runner, trial: BoundaryExits, number: int, hidden: torch.Tensor, flow: Flow) -> None:
    """Asking a boundary, one exit, and making the launch of the rows that go on."""
    flow.hidden = hidden
    goes_on, _ = trial.split(number, flow, is_on=True)
    if isinstance(goes_on, Arrivals):
        goes_on = runner.prepared(goes_on.lanes, goes_on.hidden)
    if goes_on is not None and runner.graphs is None:
        _ = goes_on.calls  # made when asked for, as its stage does


def _exit(exits: BoundaryExits, number: int, hidden: torch.Tensor, flow: Flow) -> None:
    index = torch.arange(len(hidden), device=hidden.device)
    states = unit_rms(hidden)
    exits.boundaries[number].head(states)
    if exits.kv_policy == "fitted":
        exits.fill.fitted(number, states, flow.rows, index, flow.calls)
    elif exits.kv_policy == "copy":
        exits.fill.copied(number, hidden, flow.rows, index)


def _head(runner: Runner, hidden: torch.Tensor) -> None:
    runner.adapter.head(runner.adapter.final_norm(hidden[None])).argmax(-1)


def _timed(runner: Runner, work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    is_cuda = runner.adapter.device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
