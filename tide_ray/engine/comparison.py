"""Checks a promise of the cost model by experiment: steps with exits and steps of full depth take turns.

Costs are measured at start-up over rows alone, one part at a time. What a whole step costs beside them (Python, caches
that parts take from each other, a policy's reading) shows only in steps, so that a promise of a few per cent can end
below full depth. Here every size class of residents gets its trials, and a plan runs only where they bear it out.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tide_ray.engine.cost_model import EngineCosts, LaunchPlan

TURNS = (True, False, False, True)
"""Whether exits are on in each turn of a trial: what drifts (contexts grow, neighbours on the machine) cancels out."""
TURN_STEPS = 8
TRIALS_KEPT = 5
MAX_RESIDENTS_RATIO = 1.25
"""Residents of a trial are at most this many times more or less than at its start: others are other work."""
FIRST_TRIALS = 2
"""Trials of a size class in a row before its first verdict; one alone may meet a slow second of the machine."""
WAIT_STEPS = 256
MAX_WAIT_STEPS = 1024
"""Steps between trials: ``WAIT_STEPS`` more after each, up to this. One trial in as many steps costs half of its 32
steps times what the better side gains, well below a per cent."""


@dataclass(slots=True)
class Side:
    """Steps of one side of a trial. ``work``: seconds that the cost model gives them at full depth."""

    work: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.work / self.seconds


@dataclass(slots=True)
class Trial:
    """A trial that runs: residents at its start, which turn it is at, steps of the turn so far, both sides' sums, and
    what was promised."""

    residents: int
    turn: int = 0
    num_settling: int = 0
    num_steps: int = 0
    sides: dict[bool, Side] = field(default_factory=lambda: {True: Side(), False: Side()})
    promises: list[float] = field(default_factory=list)

    @property
    def has_exits(self) -> bool:
        return TURNS[self.turn]

    @property
    def ratio(self) -> float | None:
        """Measured gain over promised gain, None before each side has had a turn."""
        if self.turn < 2 or not all(side.work for side in self.sides.values()):
            return None
        return self.sides[True].rate / self.sides[False].rate / statistics.fmean(self.promises)

    def is_like(self, residents: int) -> bool:
        return max(residents, self.residents) <= MAX_RESIDENTS_RATIO * min(residents, self.residents)

    def to_next_turn(self) -> None:
        self.turn, self.num_settling, self.num_steps = self.turn + 1, 0, 0


@dataclass(slots=True)
class Findings:
    """Of one size class: measured gain over promised gain of the last trials, trials so far, also those that were
    broken off before there was any, and steps until the next."""

    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=TRIALS_KEPT))
    num_trials: int = 0
    wait: int = 0

    def note(self, ratio: float | None) -> None:
        if ratio is not None:
            self.ratios.append(ratio)
        self.num_trials += 1
        if self.num_trials >= FIRST_TRIALS:
            self.wait = min(WAIT_STEPS * (self.num_trials - FIRST_TRIALS + 1), MAX_WAIT_STEPS)

    @property
    def ratio(self) -> float:
        """What a promise is worth: 1.0 where it was kept, or was never tried."""
        return statistics.median(self.ratios) if self.ratios else 1.0


class Comparison:
    """Trials of plans with exits against full depth, a class for each power of two of residents."""

    def __init__(self, costs: EngineCosts) -> None:
        self._costs = costs
        self._findings: dict[int, Findings] = {}
        self._trial: Trial | None = None
        self._running: LaunchPlan | None = None
        self._residents = 0
        self._prompt_rows = 0

    def settle(self, plan: LaunchPlan, residents: int) -> LaunchPlan:
        """The plan of the next step: ``plan``, or full depth where that is faster or has its turn."""
        chosen = plan if not plan.exits or self._lets(plan, residents) else LaunchPlan.all_off(len(plan.is_on))
        self._running, self._residents = chosen, residents
        if self._trial is not None and chosen.exits:
            self._trial.promises.append(plan.gain)
        return chosen

    def _lets(self, plan: LaunchPlan, residents: int) -> bool:
        if self._trial is not None and not self._trial.is_like(residents):
            self._end(self._trial)
        if self._trial is not None:
            return self._trial.has_exits
        findings = self._of(residents)
        # What exits are worth does not show beside many more rows of prompts, as where residents come.
        if findings.wait or self._prompt_rows > residents:
            findings.wait = max(findings.wait - 1, 0)
            return plan.gain * findings.ratio > 1.0
        self._trial = Trial(residents)
        return self._trial.has_exits

    def _of(self, residents: int) -> Findings:
        return self._findings.setdefault(residents.bit_length(), Findings())

    def stepped(self, seconds: float, num_tokens: int, num_prompt_rows: int) -> None:
        """Note the step that ``settle`` gave the plan of.

        Args:
            seconds: of the whole step.
            num_tokens: that sequences got since the step before.
            num_prompt_rows: rows of prompts in it, which run beside those that decode.
        """
        trial, plan = self._trial, self._running
        self._running, self._prompt_rows = None, num_prompt_rows
        if trial is None or plan is None or plan.exits != trial.has_exits:
            return
        if trial.num_settling < math.prod(plan.holds):
            trial.num_settling += 1  # rows of the turn before still go through, or the first ones of this turn wait
            return
        num_rows = self._residents + num_prompt_rows
        side = trial.sides[plan.exits]
        side.work += (num_tokens + num_prompt_rows) * self._costs.full_depth(num_rows) / num_rows
        side.seconds += seconds
        trial.num_steps += 1
        if trial.num_steps < TURN_STEPS:
            return
        trial.to_next_turn()
        if trial.turn == len(TURNS):
            self._end(trial)

    def _end(self, trial: Trial) -> None:
        self._trial = None
        self._of(trial.residents).note(trial.ratio)

    def to_json(self) -> list[dict[str, Any]]:
        """For run records: of each size class that was tried, what promises came to."""
        return [
            {
                "residents_from": 1 << (size_class - 1),
                "trials": findings.num_trials,
                "measured_over_promised": round(findings.ratio, 4),
            }
            for size_class, findings in sorted(self._findings.items())
            if findings.ratios
        ]
