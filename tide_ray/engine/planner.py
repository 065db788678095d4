"""Chooses, from measured costs and the exits seen so far, which boundaries are on and how long survivors wait.

The choice is made anew as the number of residents, the share of exits and the time that stages take change (contexts
grow, other work shares the machine), and has to prove itself in steps (see ``comparison``). A boundary that is off is
asked now and then without letting anything stop, so that it can come back.
"""

from __future__ import annotations

from collections.abc import Sequence

from tide_ray.engine.comparison import Comparison
from tide_ray.engine.cost_model import EngineCosts, LaunchPlan, best_plan

PROBE_EVERY = 64
SMOOTHING = 0.1
TIME_SMOOTHING = 0.02
TIME_STEP = 0.1
"""Plans are made anew when a stage takes this much more or less of its measured time."""
MAX_TIME_FACTOR = 4.0
DRAFTS_KEPT = 64
"""Judged drafts that the share of right ones is taken over."""
FORGETTING = 0.1
"""Of what was learnt of drafts, the part that each probe takes back while nothing is drafted."""
WARM_ROWS = 32
"""Rows to see at a boundary before its observed share of exits replaces the calibrated one."""


class LaunchPlanner:
    """One plan for each step.

    Args:
        costs: measured; None: every boundary is on and survivors go on at once.
        shares: of the rows that reach each boundary, the share expected to exit (from calibration).
        always: keep every boundary on, whether it pays or not.
        acceptance: share of drafts expected to be right, where exits are drafts.
    """

    def __init__(
        self,
        costs: EngineCosts | None,
        shares: Sequence[float],
        *,
        always: bool = False,
        acceptance: float | None = None,
    ) -> None:
        self.costs = costs
        self.shares = list(shares)
        self.always = always or costs is None
        self.acceptance = acceptance
        self._expected_acceptance = acceptance or 0.0
        self._seen = [0] * len(shares)
        self._since = [0] * (len(shares) + 1)  # launches of the stage before, since each stage's last launch
        self._steps = 0
        self.time_factors = [1.0] * (len(shares) + 1)  # time of each stage's launches over the measured curve's
        self._plans: dict[tuple[int, ...], LaunchPlan] = {}
        self.current = LaunchPlan((True,) * len(shares), (1,) * len(shares))
        self.comparison = None if costs is None or always else Comparison(costs)
        self.num_switches = 0
        self.is_stopped = False

    def stop(self) -> None:
        """Every boundary is off from now on, whatever it would save."""
        self.current, self.is_stopped = LaunchPlan.all_off(len(self.shares)), True

    def plan(self, residents: int) -> LaunchPlan:
        """The plan for a step with this many decoding sequences."""
        self._steps += 1
        if self.probes and self.acceptance is not None and not self.current.exits:
            # Nothing is drafted, so nothing is learnt: after a while it is worth another try.
            self.acceptance += FORGETTING * (self._expected_acceptance - self.acceptance)
        if self.costs is None or residents == 0 or self.is_stopped:
            return self.current
        rounded = [round(share * 50) for share in self.shares]
        slowed = [max(round(factor / TIME_STEP), 1) for factor in self.time_factors]  # time is never nothing
        right = -1 if self.acceptance is None else round(self.acceptance * 50)
        key = (_bucket(residents), right, *rounded, *slowed)
        if key not in self._plans:
            costs = self.costs.scaled([factor * TIME_STEP for factor in slowed])
            acceptance = None if self.acceptance is None else right / 50
            self._plans[key] = self._choose(costs, key[0], [share / 50 for share in rounded], acceptance)
        chosen = self._plans[key]
        if self.comparison is not None:
            chosen = self.comparison.settle(chosen, residents)
        self.num_switches += chosen.is_on != self.current.is_on
        self.current = chosen
        return chosen

    def _choose(
        self, costs: EngineCosts, residents: int, shares: Sequence[float], acceptance: float | None
    ) -> LaunchPlan:
        if self.always:
            return best_plan(costs, residents, shares, min_gain=0.0, must_be_on=True, acceptance=acceptance)
        return best_plan(costs, residents, shares, acceptance=acceptance)

    @property
    def probes(self) -> bool:
        """Whether this step asks the boundaries that are off as well."""
        return self._probes_at(self._steps)

    @property
    def probes_next(self) -> bool:
        """``probes`` of the step after this one."""
        return self._probes_at(self._steps + 1)

    def _probes_at(self, step: int) -> bool:
        return step % PROBE_EVERY == 1 and not self.is_stopped

    def observe(self, boundary: int, num_asked: int, num_stopped: int) -> None:
        """Note what a boundary's policy said."""
        if not num_asked:
            return
        self._seen[boundary] += num_asked
        if self._seen[boundary] < WARM_ROWS:
            return
        weight = min(1.0, SMOOTHING * num_asked / 32)
        self.shares[boundary] += weight * (num_stopped / num_asked - self.shares[boundary])

    def observe_drafts(self, num_right: int, num_wrong: int) -> None:
        """Note how many drafts of a chain full depth confirmed, and whether one was wrong."""
        num_judged = num_right + num_wrong
        if self.acceptance is not None and num_judged:
            weight = min(1.0, num_judged / DRAFTS_KEPT)
            self.acceptance += weight * (num_right / num_judged - self.acceptance)

    def took(self, stages: Sequence[int], num_rows: int, seconds: float) -> None:
        """Note how long a launch of decode rows took, through one stage or several."""
        if self.costs is not None:
            expected = sum(self.costs.stages[stage](num_rows) for stage in stages)
            factor = min(seconds / expected, MAX_TIME_FACTOR)
            for stage in stages:
                self.time_factors[stage] += TIME_SMOOTHING * (factor - self.time_factors[stage])

    def stepped(self, seconds: float, num_tokens: int, num_prompt_rows: int) -> None:
        """Note how long a whole step took, what sequences got in it, and the rows of prompts that ran beside."""
        if self.comparison is not None:
            self.comparison.stepped(seconds, num_tokens, num_prompt_rows)

    def should_launch(self, stage: int, num_ready: int) -> bool:
        """Whether the rows ready for ``stage`` run now (True) or wait for more."""
        self._since[stage] += 1
        return num_ready > 0 and self._since[stage] >= self.current.holds[stage - 1]

    def launched(self, stage: int) -> None:
        self._since[stage] = 0


def _bucket(residents: int) -> int:
    """Residents rounded so that plans are few: exact to 8, then in eighths of a power of two."""
    if residents <= 8:
        return residents
    step = 1 << (residents.bit_length() - 4)
    return residents // step * step
