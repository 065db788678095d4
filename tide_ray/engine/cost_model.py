"""What a launch costs, and from that: which boundaries pay, and how long survivors should wait at one.

A stage's launch of n rows costs t(n), measured. With R residents of which a share exits at each boundary, the rows
that wait at a boundary are missing from the stages before it, so waiting pays only where most rows exit or the stage
before is short. ``best_plan`` compares the expected rates of all choices; with no boundary on, the engine is the
full-depth engine.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tide_ray.engine.speculation import MAX_DRAFTS

MAX_HOLD = 8
MIN_GAIN = 1.02
"""A boundary is used only when the model promises this much over leaving it off: promises come out up to 2 % too high,
and smaller ones would end below full depth."""
MIN_HOLD_GAIN = 1.05
"""Survivors wait only where the model promises this much over going on at once: it knows nothing of what keeping their
states costs, and promises of 4 % ended 8 % below full depth."""


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a launch by its number of rows: linear between the measured points and beyond the last."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def consistent(cls, rows: Sequence[int], seconds: Sequence[float]) -> CostCurve:
        """The curve of measured ``seconds``, less what contradicts itself.

        Fewer rows take no longer than more, and n rows no longer than n / m launches of m. Without the second a slow
        moment at the largest size made waiting look like a gain: it parts what full depth would run as one launch.
        """
        falling = list(itertools.accumulate(reversed(seconds), min))[::-1]
        least = itertools.accumulate((time / n for n, time in zip(rows, falling, strict=True)), min)
        return cls(tuple(rows), tuple(n * per_row for n, per_row in zip(rows, least, strict=True)))

    def __call__(self, num_rows: float) -> float:
        if num_rows <= 0:
            return 0.0
        if num_rows <= self.rows[0]:
            return self.seconds[0]
        if len(self.rows) == 1:  # an engine of one resident: more rows are at worst that many launches
            return self.seconds[0] * num_rows / self.rows[0]
        right = min(bisect_left(self.rows, num_rows), len(self.rows) - 1)
        left = right - 1
        slope = (self.seconds[right] - self.seconds[left]) / (self.rows[right] - self.rows[left])
        return self.seconds[left] + slope * (num_rows - self.rows[left])

    def scaled(self, factor: float) -> CostCurve:
        return CostCurve(self.rows, tuple(seconds * factor for seconds in self.seconds))


FREE = CostCurve((0, 1), (0.0, 0.0))


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Measured curves: every stage; for every boundary the gate with the split of rows, and what an exit adds (exit
    head, K/V of the skipped layers) by the number of exiting rows; the LM head with the choice of tokens."""

    stages: tuple[CostCurve, ...]
    gates: tuple[CostCurve, ...]
    exits: tuple[CostCurve, ...]
    head: CostCurve

    def scaled(self, factors: Sequence[float]) -> EngineCosts:
        """Stages that take ``factors`` times as long as measured; all else slows down as the least slowed of them."""
        common = min(factors)
        return EngineCosts(
            stages=tuple(stage.scaled(factor) for stage, factor in zip(self.stages, factors, strict=True)),
            gates=tuple(gate.scaled(common) for gate in self.gates),
            exits=tuple(exit_.scaled(common) for exit_ in self.exits),
            head=self.head.scaled(common),
        )

    def full_depth(self, num_rows: float) -> float:
        """Seconds of a step that takes so many rows through every stage and the head."""
        return sum(stage(num_rows) for stage in self.stages) + self.head(num_rows)

    def to_json(self) -> dict[str, Any]:
        """For run records; seconds to the nanosecond."""
        curves = {"stages": self.stages, "gates": self.gates, "exits": self.exits, "head": (self.head,)}
        return {
            "rows": list(self.head.rows),
            **{name: [[round(t, 9) for t in curve.seconds] for curve in some] for name, some in curves.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EngineCosts:
        """What ``to_json`` wrote of curves that were measured at the same numbers of rows."""
        rows = tuple(values["rows"])
        parts = {
            name: tuple(CostCurve(rows, tuple(seconds)) for seconds in values[name])
            for name in ("stages", "gates", "exits", "head")
        }
        return cls(parts["stages"], parts["gates"], parts["exits"], parts["head"][0])

    def without_overheads(self) -> EngineCosts:
        """Gates and exits for nothing: what bounds any engine with these stages."""
        nothing = tuple(FREE for _ in self.gates)
        return EngineCosts(self.stages, nothing, nothing, self.head)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """``is_on``: which boundaries let rows exit. ``holds``: launches of the stage before for one of the stage behind
    it, 1 meaning that survivors go on at once. ``rate``: expected tokens per second; ``gain``: that over the rate with
    every boundary off."""

    is_on: tuple[bool, ...]
    holds: tuple[int, ...]
    rate: float = 0.0
    gain: float = 1.0

    @classmethod
    def all_off(cls, num_boundaries: int, rate: float = 0.0) -> LaunchPlan:
        return cls((False,) * num_boundaries, (1,) * num_boundaries, rate)

    @property
    def exits(self) -> bool:
        return any(self.is_on)


def expected_rate(
    costs: EngineCosts,
    residents: int,
    shares: Sequence[float],
    is_on: Sequence[bool],
    holds: Sequence[int],
    acceptance: float | None = None,
) -> float:
    """Tokens per second in the steady state.

    Args:
        residents: sequences that decode.
        shares: of the rows that reach each boundary, the share that exits there when it is on.
        is_on, holds: as in LaunchPlan.
        acceptance: exits are drafts, and this share of those that full depth judges is right. None: they are tokens.

    With n rows in a launch of stage 0, reach q_s of them at stage s and one launch of stage s for every K_s of stage 0,
    residents are n (1 + sum_s (K_s - K_(s-1)) q_s): those in flight and those that wait. A launch that no row would
    reach does not happen, which matters where few rows decode: the others get what is left of the rows.

    Drafts save no rows, only launches: all positions go through every stage in the end, those of a chain together, and
    each draft passes the head twice. Of a chain of m rows (a^m - 1) / (a - 1) tokens come on average, with acceptance a
    (Leviathan et al., arXiv 2211.17192).
    """
    reach, every = [1.0], [1]
    for share, on, hold in zip(shares, is_on, holds, strict=True):
        reach.append(reach[-1] * (1 - share) if on else reach[-1])
        every.append(every[-1] * hold if on else every[-1])
    if acceptance is not None:
        reach = [max(share, 1 / (MAX_DRAFTS + 1)) for share in reach]
    in_flight = 1.0 + sum((every[s] - every[s - 1]) * reach[s] for s in range(1, len(every)))
    rows = residents / in_flight
    num_chosen = rows if acceptance is None else rows * (2 - reach[-1])
    seconds = costs.head(num_chosen)
    for s, stage in enumerate(costs.stages):
        asked = every[s] * reach[s] * rows
        launched = asked if acceptance is None else every[s] * rows
        happens = 1 - (1 - reach[s]) ** (every[s] * rows)
        if not happens:
            continue
        seconds += stage(launched / happens) * happens / every[s]
        if s < len(is_on) and is_on[s]:
            asks = costs.gates[s](launched / happens) * happens
            leaves = 1 - (1 - shares[s]) ** asked
            exits = costs.exits[s](asked * shares[s] / leaves) * leaves if leaves else 0.0
            seconds += (asks + exits) / every[s]
    kept = 1.0 if acceptance is None else _kept_share(1 / reach[-1], acceptance)
    return rows * kept / seconds


def _kept_share(length: float, acceptance: float) -> float:
    """Tokens that a chain of ``length`` rows gives, for each of its rows."""
    if acceptance >= 1:
        return 1.0
    return (1 - acceptance**length) / ((1 - acceptance) * length)


def best_plan(
    costs: EngineCosts,
    residents: int,
    shares: Sequence[float],
    *,
    min_gain: float = MIN_GAIN,
    min_hold_gain: float = MIN_HOLD_GAIN,
    must_be_on: bool = False,
    acceptance: float | None = None,
) -> LaunchPlan:
    """The plan of the highest expected rate.

    Args:
        min_gain: all boundaries are off unless one promises this much over that.
        min_hold_gain: survivors go on at once unless waiting promises this much over that.
        must_be_on: only plans with every boundary on are compared.
        acceptance: as in ``expected_rate``.
    """
    num = len(shares)
    off = (False,) * num, (1,) * num
    off_rate = expected_rate(costs, residents, shares, *off, acceptance)
    best = LaunchPlan((True,) * num, (1,) * num) if must_be_on else LaunchPlan.all_off(num, off_rate)
    choices = [(True,) * num] if must_be_on else list(itertools.product((False, True), repeat=num))
    at_once = [(is_on, (1,) * num) for is_on in choices]
    waiting = [
        (is_on, holds)
        for is_on in choices
        for holds in itertools.product(*(range(1, MAX_HOLD + 1) if on else (1,) for on in is_on))
        if any(hold > 1 for hold in holds)
    ]
    for plans, gain in ((at_once, min_gain), (waiting, min_hold_gain)):
        needed = best.rate * gain
        for is_on, holds in plans:
            rate = expected_rate(costs, residents, shares, is_on, holds, acceptance)
            if rate > max(best.rate, needed):
                best = LaunchPlan(is_on, holds, rate, rate / off_rate)
    return best


@dataclass(frozen=True, slots=True)
class Limits:
    """Speed-ups over full depth with as many residents.

    ``ceiling``: skipping is free, 1 / (1 - sum of skipped shares of the time), where the head is not skipped.
    ``bound``: of ``plan``, the best launch policy. ``free_bound``: of the best one if asking, parting rows and filling
    K/V cost nothing.
    """

    full_rate: float
    ceiling: float
    free_bound: float
    bound: float
    plan: LaunchPlan


def limits(costs: EngineCosts, residents: int, shares: Sequence[float]) -> Limits:
    """What can be had at best where these shares of the rows that reach each boundary exit there."""
    seconds = [stage(residents) for stage in costs.stages]
    reach = itertools.accumulate(shares, lambda left, share: left * (1 - share), initial=1.0)
    skipped = sum((1 - reached) * one for reached, one in zip(reach, seconds, strict=True))
    total = costs.full_depth(residents)
    off = expected_rate(costs, residents, shares, [False] * len(shares), [1] * len(shares))
    plan = best_plan(costs, residents, shares, min_gain=0.0, min_hold_gain=0.0)
    free = best_plan(costs.without_overheads(), residents, shares, min_gain=0.0, min_hold_gain=0.0)
    return Limits(off, total / (total - skipped), free.rate / off, plan.rate / off, plan)
